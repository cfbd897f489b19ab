"""How often a key may ask: a token bucket for each, in the memory of one API process.

Does not cover: a limit over several processes (each grants its own), nor a budget of tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Allowance:
    """What a key has left after it asked. wait_s: until one more request is granted; reset_s: until all are there."""

    granted: bool
    limit: int
    remaining: int
    wait_s: float
    reset_s: float

    def headers(self) -> dict[str, str]:
        """As OpenAI names them; the limit is what may be sent at once."""
        return {
            "x-ratelimit-limit-requests": str(self.limit),
            "x-ratelimit-remaining-requests": str(self.remaining),
            "x-ratelimit-reset-requests": duration(self.reset_s),
        }


class RateLimits:
    """Buckets of `burst` requests that fill by `per_minute`. One entry per key that was ever seen: keys are few."""

    def __init__(self, per_minute: int, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = per_minute / 60, burst, clock
        self._buckets: dict[str, tuple[float, float]] = {}  # key id → what was left, and when

    def take(self, key_id: str) -> Allowance:
        """Count one request; one that is refused costs nothing."""
        at = self._clock()
        left, seen = self._buckets.get(key_id, (float(self._burst), at))
        left = min(float(self._burst), left + (at - seen) * self._rate)
        granted = left >= 1
        left -= granted
        self._buckets[key_id] = (left, at)
        return Allowance(
            granted=granted,
            limit=self._burst,
            remaining=int(left),
            wait_s=max(0.0, 1 - left) / self._rate,
            reset_s=(self._burst - left) / self._rate,
        )


def duration(seconds: float) -> str:
    """`17ms`, `1.5s`, `6m0s`: how OpenAI writes a time until a reset."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 60:
        return f"{seconds:.4g}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest}s"
