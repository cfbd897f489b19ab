"""A rate limit: so many requests a second, evenly spaced.

Does not cover: limits across processes; one job is graded by one supervisor.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class RateLimit:
    """A token bucket of one token: no second ever sees more than `per_second` departures (plus the first)."""

    def __init__(self, per_second: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = 1.0 / per_second
        self._clock = clock
        self._next = float("-inf")

    async def wait(self, within_s: float = float("inf")) -> None:
        """Return when it is this caller's turn; turns are given out in the order of asking.

        Raises TimeoutError at once where that is not within `within_s`: whoever cannot use a turn takes none away.
        """
        now = self._clock()
        turn = max(now, self._next)
        if turn - now > within_s:
            raise TimeoutError
        self._next = turn + self._interval_s
        if turn > now:
            await asyncio.sleep(turn - now)
