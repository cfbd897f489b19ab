"""A Celery worker as `hone worker` starts it, with the stub for a supervisor. Arguments: notes, seconds a job, seconds
between two looks, leash.

Does not cover: the command line of `workers.tasks`.
"""

from __future__ import annotations

import sys

from app.core import logging as hone_logging
from app.core.settings import Settings
from workers.devices import visible_only
from workers.slot import Slot
from workers.tasks import serve


def main(notes: str, seconds: str, look_s: str, leash_fd: str) -> None:
    hone_logging.configure("text")
    Slot.poll_s = float(look_s)
    command = (sys.executable, "-m", "tests.unit.workers.stub_supervisor", notes, seconds)
    serve(Settings(), frozenset({"hone"}), environment=visible_only([2, 3]), leash_fd=int(leash_fd), command=command)


if __name__ == "__main__":
    main(*sys.argv[1:5])
