"""A look at something outside that may hang: never more than one at a time, never waited for past a deadline.

Does not cover: cancelling it. A thread in a dead network mount cannot be cancelled; the next caller finds it still
there and waits for the same look instead of starting another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Belongs to one event loop."""

    def __init__(self, look: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._look = look
        self._task: asyncio.Task[T] | None = None

    async def result(self, deadline_s: float) -> T:
        """What the look under way, or a new one, finds. Raises TimeoutError, and whatever the look raises."""
        task = self._task
        if task is None or task.done():
            task = self._task = asyncio.create_task(self._look())
        done, _ = await asyncio.wait({task}, timeout=deadline_s)
        if not done:
            raise TimeoutError
        return task.result()
