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
        inherited = contextvars.copy_context()  # its lines name the job, too
        self._thread = threading.Thread(target=inherited.run, args=(self._run,), name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def moved(self) -> None:
        self._progress = time.monotonic()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        engine = create_sync(self._url)
        renewed = time.monotonic()
        try:
            while not self._stop.wait(self._lease_s / 4):
                stuck = time.monotonic() - self._progress
                if stuck > max(LOOP_SILENCE_S, self._lease_s / 2):
                    log.error("event loop has not moved for %.0f s; the lease is not renewed", stuck)
                else:
                    try:
                        if not leases.renew(engine, self._fence, self._lease_s):
                            self._on_lost("the lease is lost: cancelled, or taken by another worker")
                            return
                        renewed = time.monotonic()
                        self._beside(engine)
                    except SQLAlchemyError as error:
                        log.warning("heartbeat failed: %s", error)
                if time.monotonic() - renewed > self._lease_s * 0.75:
                    self._on_lost("the lease could not be renewed in time")
                    return
        finally:
            engine.dispose()
