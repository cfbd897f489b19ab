"""A Celery worker for one set of GPUs: `python -m workers.tasks --queue NAME[,NAME] [--gpus 0,1]`.

Does not cover: what a ring leads to (`workers.slot`). Celery has the main thread and its signals, the slot an event
loop in a thread of its own, and the one pool thread only waits. SIGTERM, or the end of the leash, stops the slot, which
puts its job back within seconds; Celery's warm shutdown then has nothing left to wait for.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping

from celery import signals
from sqlalchemy.exc import SQLAlchemyError

from app.core import logging as hone_logging
from app.core.settings import Settings
from app.jobs.doorbell import TASK
from app.jobs.leases import owner_name
from workers import leash
from workers.celery_app import NoBroker, make_celery
from workers.devices import visible_only
from workers.doors import GRACE_S, SUPERVISOR
from workers.slot import Slot

log = logging.getLogger("hone.tasks")


class SlotThread:
    """A slot and its event loop, reached from Celery's threads. If the slot ends by itself, so does the process."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="slot", daemon=True)
        self.thread.start()
        self.ended = asyncio.run_coroutine_threadsafe(slot.run(), self.loop)
        self.ended.add_done_callback(self._has_ended)

    def _has_ended(self, ended: concurrent.futures.Future[None]) -> None:
        if not self.slot.stopping.is_set():
            log.error("the slot ended", exc_info=ended.exception())
            self.slot.stopping.set()
            os.kill(os.getpid(), signal.SIGTERM)

    def take(self, job_id: str) -> None:
        """Blocks until the job needs nothing more from here."""
        if self.slot.stopping.is_set():
            return
        try:
            asyncio.run_coroutine_threadsafe(self.slot.take(job_id), self.loop).result()
        except SQLAlchemyError as error:
            log.warning("a ring for %s was in vain: %s; the slot looks again by itself", job_id, error)

    def ask_to_stop(self, **_: object) -> None:
        self.loop.call_soon_threadsafe(self.slot.stopping.set)

    def join(self) -> None:
        self.ask_to_stop()
        concurrent.futures.wait([self.ended], GRACE_S + 5)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        if not self.thread.is_alive():
            self.loop.close()


def serve(
    settings: Settings,
    queues: frozenset[str],
    *,
    environment: Mapping[str, str],
    leash_fd: int | None = None,
    command: tuple[str, ...] = SUPERVISOR,
) -> None:
    """Blocks until SIGTERM or the end of the leash. Raises `NoBroker`."""
    celery = make_celery(settings)
    owner = owner_name(settings.hostname, os.getpid())
    slot = SlotThread(Slot(settings, queues, owner=owner, environment=environment, command=command))

    @celery.task(name=TASK)  # type: ignore[untyped-decorator]
    def take(job_id: str) -> None:
        slot.take(job_id)

    signals.setup_logging.connect(_leave_logging, weak=False)
    signals.worker_shutting_down.connect(slot.ask_to_stop, weak=False)
    if leash_fd is not None:
        leash.watch(leash_fd, lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        celery.worker_main(
            ["--quiet",  # the banner is no line of a log
             "worker", "--queues", ",".join(sorted(queues)), "--hostname", f"hone-{os.getpid()}@{settings.hostname}",
             "--without-gossip", "--without-mingle", "--without-heartbeat"]
        )  # fmt: skip
    finally:
        slot.join()


def _leave_logging(**_: object) -> None:
    """That somebody listens keeps Celery from setting up logging its own way."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="workers.tasks")
    parser.add_argument("--queue", required=True)
    parser.add_argument("--gpus", default=None)
    parser.add_argument("--leash-fd", type=int, default=None)
    options = parser.parse_args()
    settings = Settings()
    hone_logging.configure(settings.log_format)
    environment = {} if options.gpus is None else visible_only([int(index) for index in options.gpus.split(",")])
    try:
        serve(settings, frozenset(options.queue.split(",")), environment=environment, leash_fd=options.leash_fd)
    except NoBroker as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
