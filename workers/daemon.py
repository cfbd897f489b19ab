"""A process with one duty, done again and again until SIGTERM, SIGINT or the end of its leash.

Does not cover: the duties (`workers.local`, `workers.sampler.keeper`). A database that is away for a moment ends none:
a keeper that dies takes its samplers with it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import time
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from app.core import logging as hone_logging
from app.core.settings import Settings
from workers import leash

log = logging.getLogger("hone.daemon")


class Daemon:
    """Subclasses say what one pass is; `run` does the rest."""

    poll_s = 0.5  # between two passes
    beat_s = 5.0  # between two signs of life

    def __init__(self) -> None:
        self.stopping = asyncio.Event()

    async def begin(self) -> None:
        """Before the first pass."""

    async def tick(self) -> None:
        """One pass of the duty."""

    async def beat(self) -> None:
        """A sign of life."""

    async def shut_down(self) -> None:
        """After the last pass, also when one raised."""

    async def run(self) -> None:
        await self.begin()
        beaten = float("-inf")
        try:
            while not self.stopping.is_set():
                try:
                    await self.tick()
                    if time.monotonic() - beaten > self.beat_s:
                        await self.beat()
                        beaten = time.monotonic()
                except SQLAlchemyError as error:
                    log.warning("%s: the database refused: %s", type(self).__name__, error)
                try:
                    await asyncio.wait_for(self.stopping.wait(), self.poll_s)
                except TimeoutError:
                    continue
        finally:
            await self.shut_down()


def main(program: str, make: Callable[[Settings], Daemon]) -> None:
    """Entry point: `--leash-fd N` is a pipe whose end-of-file means that the parent is gone."""
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("--leash-fd", type=int, default=None)
    options = parser.parse_args()
    settings = Settings()
    hone_logging.configure(settings.log_format)
    asyncio.run(_main(make, settings, options.leash_fd))


async def _main(make: Callable[[Settings], Daemon], settings: Settings, leash_fd: int | None) -> None:
    daemon = make(settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, daemon.stopping.set)
    if leash_fd is not None:
        leash.watch(leash_fd, lambda: loop.call_soon_threadsafe(daemon.stopping.set))
    await daemon.run()
