"""Stands for a supervisor that is killed, and for a trainer that hangs: it ignores SIGTERM and the end of its pipe.

Does not cover: claim and lease. `FILE JOB` announces itself, starts the trainer, writes its id into FILE and sleeps;
`hang` is the trainer, which starts a second rank in its group.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

from app.core.settings import Settings
from app.db.engine import Database
from workers.identity import MARK
from workers.leftovers import SUPERVISOR
from workers.presence import Presence
from workers.process import spawn

ME = (sys.executable, "-m", "tests.unit.workers.stub_left_behind")
LONG_S = 300.0


async def supervise(notes: Path, job_id: str) -> None:
    settings = Settings()
    database = Database(settings.database)
    presence = Presence(database, SUPERVISOR, settings.hostname, job_id)
    await presence.announce()
    log = settings.logs_dir / "trainer.log"
    child = spawn([*ME, "hang"], log=log, environment={MARK: presence.id}, leash=())
    await presence.trainer_started(child.pid)
    notes.write_text(str(child.pid))
    await asyncio.sleep(LONG_S)


def hang(*, ranks: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if ranks:
        subprocess.Popen([*ME, "rank"])
    time.sleep(LONG_S)


if __name__ == "__main__":
    if sys.argv[1] in ("hang", "rank"):
        hang(ranks=1 if sys.argv[1] == "hang" else 0)
    else:
        asyncio.run(supervise(Path(sys.argv[1]), sys.argv[2]))
