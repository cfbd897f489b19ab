"""How many chat requests one API process works on at once, and how many may wait for their turn.

Does not cover: the sampler's own queue, which batches what is let through here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app.core.errors import Unavailable

RETRY_AFTER_S = 2.0


class Gate:
    """`limit` requests inside, `queue` before the door; one more is told to come back."""

    def __init__(self, limit: int, queue: int) -> None:
        self._slots = asyncio.Semaphore(limit)
        self._queue = queue
        self._waiting = 0

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        """Wait for a slot, first come first served. Raises Unavailable when the queue is full."""
        if self._slots.locked() and self._waiting >= self._queue:
            raise Unavailable(
                f"{self._waiting} requests are waiting already; try again.",
                retry_after_s=RETRY_AFTER_S,
                code="overloaded",
            )
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._slots.release()
