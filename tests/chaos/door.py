"""`python -m tests.chaos.door KIND`: a real door, janitor or keeper that starts the storm's supervisor and engine.

Does not cover: the API; jobs come from the storm itself (`jobs`), through the same code.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from tests.chaos import faulty
from tests.chaos.audit import Identity
from tests.chaos.orders import Orders

faulty.spare_openai()

from app.core import logging as hone_logging  # noqa: E402
from app.core.settings import Settings  # noqa: E402
from app.jobs.doorbell import DEFAULT_QUEUE  # noqa: E402
from app.jobs.leases import owner_name  # noqa: E402
from app.models.catalogue import BaseModel  # noqa: E402
from workers.daemon import Daemon, main  # noqa: E402
from workers.doors import start_supervisor  # noqa: E402
from workers.janitor import Janitor  # noqa: E402
from workers.local import Runner  # noqa: E402
from workers.process import Child  # noqa: E402
from workers.sampler.keeper import Keeper  # noqa: E402
from workers.sampler.launch import Engine, Launch  # noqa: E402
from workers.slot import Slot  # noqa: E402

SUPERVISOR = (sys.executable, "-m", "tests.chaos.supervisor")


class StormRunner(Runner):
    def start(self, job_id: str) -> Child:
        return start_supervisor(self.settings, job_id, environment={}, command=SUPERVISOR)


class StormSlot(Slot):
    poll_s = 0.5  # a storm has no five seconds to look away


class StormEngine:
    name, servers = "storm", 1

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def launch(self, model: BaseModel, server: int, port: int) -> Launch:
        context = min(model.context, self.settings.sampler_max_model_len)
        options = {"--model": model.path, "--name": model.id, "--port": port, "--context": context}
        flat = [str(part) for pair in options.items() for part in pair]
        return Launch((sys.executable, "-m", "tests.chaos.engine", *flat), {}, None, 64)


class StormKeeper(Keeper):
    async def choose_engine(self) -> Engine:
        return StormEngine(self.settings) if os.environ["CHAOS_TRAINER"] == "tiny" else await super().choose_engine()


def slot(settings: Settings) -> Daemon:
    owner = owner_name(settings.hostname, os.getpid())
    return StormSlot(settings, frozenset({DEFAULT_QUEUE}), owner=owner, environment={}, command=SUPERVISOR)


def celery() -> None:
    """Has a way of its own to be started."""
    from workers import tasks

    parser = argparse.ArgumentParser()
    parser.add_argument("--leash-fd", type=int, default=None)
    options = parser.parse_args()
    settings = Settings()
    hone_logging.configure(settings.log_format)
    tasks.Slot = StormSlot  # type: ignore[attr-defined]
    tasks.serve(settings, frozenset({DEFAULT_QUEUE}), environment={}, leash_fd=options.leash_fd, command=SUPERVISOR)


DAEMONS: dict[str, Callable[[Settings], Daemon]] = {
    "runner": StormRunner,
    "slot": slot,
    "janitor": Janitor,
    "keeper": StormKeeper,
}

if __name__ == "__main__":
    kind = sys.argv.pop(1)
    Identity().adopt()
    faulty.jumping_clock(Orders.of_environment())
    if kind == "celery":
        celery()
    else:
        main(f"tests.chaos.door {kind}", DAEMONS[kind])
