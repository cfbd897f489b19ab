"""The heartbeat thread: renews the lease on its own synchronous connection, and fences this process when it cannot.

Does not cover: what the supervisor does after the lease is lost; the thread only kills the trainer's group and tells.

It renews only while the event loop moves (design §6.3): a supervisor whose loop hangs must lose its job, not hold it.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from app.db.engine import create_sync
from app.jobs import leases

log = logging.getLogger(__name__)

LOOP_SILENCE_S = 30.0


class Heartbeat:
    """Start it right after the claim. `moved()` is called by the event loop about once a second.

    `beside` is called after each renewal: what else says on this connection that we are alive.
    """

    def __init__(
        self,
        url: str,
        fence: leases.Fence,
        lease_s: float,
        on_lost: Callable[[str], None],
        beside: Callable[[Engine], None] = lambda engine: None,
    ) -> None:
        self._url = url
        self._fence = fence
        self._lease_s = lease_s
        self._on_lost = on_lost
        self._beside = beside
        self._stop = threading.Event()
        self._progress = time.monotonic()
        self._renewed = self._progress
        self._told = threading.Lock()  # taken by whoever tells first, and never given back
        self._threads = [
            # Their lines name the job, too.
            threading.Thread(target=contextvars.copy_context().run, args=(duty,), name=name, daemon=True)
            for duty, name in ((self._run, "heartbeat"), (self._watch, "heartbeat-watch"))
        ]

    def start(self) -> None:
        self._renewed = time.monotonic()
        for thread in self._threads:
            thread.start()

    def moved(self) -> None:
        self._progress = time.monotonic()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(timeout=5)

    def _lose(self, reason: str) -> None:
        self._stop.set()
        if self._told.acquire(blocking=False):
            self._on_lost(reason)

    def _watch(self) -> None:
        """Beside the renewals, one of which may hang in the database for longer than the lease.

        It looks twice: after the whole process stood still the renewal comes first, and decides.
        """
        overdue = False
        while not self._stop.wait(self._lease_s / 16):
            late = time.monotonic() - self._renewed > self._lease_s * 0.75
            if late and overdue:
                self._lose("the lease could not be renewed in time")
                return
            overdue = late

    def _run(self) -> None:
        engine = create_sync(self._url)
        try:
            while not self._stop.wait(self._lease_s / 4):
                stuck = time.monotonic() - self._progress
                if stuck > max(LOOP_SILENCE_S, self._lease_s / 2):
                    log.error("event loop has not moved for %.0f s; the lease is not renewed", stuck)
                else:
                    try:
                        if not leases.renew(engine, self._fence, self._lease_s):
                            self._lose("the lease is lost: cancelled, or taken by another worker")
                            return
                        self._renewed = time.monotonic()
                        self._beside(engine)
                    except SQLAlchemyError as error:
                        log.warning("heartbeat failed: %s", error)
        finally:
            engine.dispose()
