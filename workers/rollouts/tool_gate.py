"""How many calls one tool gets at once: halved when it says that it is busy, cut when load makes it slow.

Does not cover: how many trajectories run (`congestion`), and retries of a call (`app.net.exchange`).

A tool starts without a limit of its own. 429 and 503 halve what was in flight, once for each round of calls: answers
to calls that left before the last cut say nothing new. Then one more call for each full round of good answers, an
eighth of that near the level that was too much. A `Retry-After` holds every call of the tool, not only one.
"""

from __future__ import annotations

import asyncio
import statistics
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from app.net.exchange import LONGEST_ASKED_PAUSE_S, Attempted

BUSY = frozenset({429, 503})
NEAR = 0.9  # of the level that was too much; above it growth is slow
SLOWLY = 0.125
# Tool latencies have long tails: the median of 64 lognormal ones (mean 1 s, p99 10 s) still varies by a quarter, so
# only three times the quiet median, twice in a row, means that the tool is slow because of us.
WINDOW = 64
GROWN = 3.0
IN_A_ROW = 2
MORE_LOAD = 1.5
SLOW_CUT = 0.8
# A call takes about six passes of the event loop. If it takes hardly more, the loop is what it waits for: with more
# calls at once each pass is longer, no call is faster, and heartbeat and timeouts are late.
PASSES = 10
LOOP_CUT = 0.7
LEAST = 32


class ToolBusy(Exception):
    """A call's deadline passed while it waited for its turn at the tool."""

    def __init__(self, tool: str, in_line: int) -> None:
        super().__init__(f"tool {tool!r} is busy: its queue ({in_line} calls) left no turn before the deadline")
        self.tool = tool


@dataclass
class ToolTurn:
    """A call that may leave. Give `watch` to `call_tool`; `queued_s` is how long the call waited for its turn."""

    watch: Callable[[Attempted], None]
    queued_s: float


@dataclass
class _Baseline:
    """What the tool takes when it is least busy."""

    seconds: float
    load: float  # calls in flight at the time


@dataclass
class _Latency:
    """Medians over windows of calls, against the quietest so far."""

    seconds: list[float] = field(default_factory=list)
    loads: list[int] = field(default_factory=list)
    baseline: _Baseline | None = None
    grown: int = 0

    def add(self, seconds: float, load: int) -> _Baseline | None:
        """The baseline, when the last windows say that answers are slow because more calls are in flight."""
        self.seconds.append(seconds)
        self.loads.append(load)
        if len(self.seconds) < WINDOW:
            return None
        median, mean_load = statistics.median(self.seconds), statistics.fmean(self.loads)
        self.clear()
        base = self.baseline
        if base is None:
            self.baseline = _Baseline(median, mean_load)
        elif median < base.seconds:  # a quarter of the way: one lucky window is not what the tool takes
            base.seconds += (median - base.seconds) / 4
            base.load += (min(mean_load, base.load) - base.load) / 4
        elif median > GROWN * base.seconds and mean_load > MORE_LOAD * base.load:
            self.grown += 1
            if self.grown >= IN_A_ROW:
                self.grown = 0
                return base
            return None
        else:
            base.seconds *= 1.02  # work may become heavier over a job; an old baseline must not bind for ever
        self.grown = 0
        return None

    def clear(self) -> None:
        self.seconds, self.loads = [], []


class ToolGate:
    """One tool's line. Calls are let in first come, first served; a cut ends nothing that is under way."""

    def __init__(self, name: str, ceiling: int, clock: Callable[[], float]) -> None:
        self.name = name
        self.in_flight = 0
        self.why: str | None = None  # of the last cut
        self._ceiling = ceiling
        self._room = float(ceiling)
        self._too_much = float("inf")
        self._clock = clock
        self._line: deque[asyncio.Future[None]] = deque()
        self._cut_at = float("-inf")
        self._closed_until = float("-inf")
        self._reopening: asyncio.TimerHandle | None = None
        self._latency = _Latency()
        self._seconds = 0.0  # a call takes, lately

    @property
    def limit(self) -> int:
        return int(self._room)

    @property
    def in_line(self) -> int:
        return sum(not future.done() for future in self._line)

    @asynccontextmanager
    async def turn(self, timeout_s: float | None) -> AsyncIterator[ToolTurn]:
        """Wait in line, then hold a place until the call is over. Raises ToolBusy after `timeout_s`."""
        began = self._clock()
        if self._line or not self._open():
            await self._wait(timeout_s)
        else:
            self.in_flight += 1
        left = self._clock()
        try:
            yield ToolTurn(self.attempted, left - began)
        finally:
            self.in_flight -= 1
            self._admit()

    def attempted(self, attempt: Attempted) -> None:
        """Learn from how one attempt ended."""
        now = self._clock()
        if attempt.retry_after_s:
            self._close(now + min(attempt.retry_after_s, LONGEST_ASKED_PAUSE_S))
        fresh = now - attempt.seconds > self._cut_at
        if attempt.status in BUSY:
            # While more calls are out than the last cut allows, it has not shown its effect.
            if fresh and self.in_flight <= self.limit:
                self._cut(0.5 * min(self._room, self.in_flight), f"answered {attempt.status}")
        elif attempt.status is not None and fresh:
            self._seconds += (attempt.seconds - self._seconds) / 16
            base = self._latency.add(attempt.seconds, self.in_flight)
            if base is not None:
                target = max(base.load, SLOW_CUT * min(self._room, self.in_flight))
                self._cut(target, f"answers take over {GROWN:g} times as long as with {base.load:.0f} calls in flight")
            elif self._line or self.in_flight >= self.limit:
                self._grow()

    def relieve(self, late_s: float) -> None:
        """The event loop is late: fewer calls at once, if it is what they wait for."""
        if LEAST < self.in_flight <= self.limit and self._seconds < PASSES * late_s:
            self._cut(max(LEAST, LOOP_CUT * self.in_flight), f"the event loop is {1000 * late_s:.0f} ms late")

    def _grow(self) -> None:
        rate = SLOWLY if self._room >= NEAR * self._too_much else 1.0
        self._room = min(float(self._ceiling), self._room + rate / max(self._room, 1.0))
        self._admit()

    def _cut(self, room: float, why: str) -> None:
        self._too_much = min(self._room, float(max(self.in_flight, 1)))
        self._room = max(1.0, room)
        self._cut_at = self._clock()
        self._latency.clear()
        self.why = why

    # --- the line ---

    def _open(self) -> bool:
        return self.in_flight < self.limit and self._clock() >= self._closed_until

    async def _wait(self, timeout_s: float | None) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(future)
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except BaseException as error:
            if future.done() and not future.cancelled():  # its turn came in the same moment: pass it on
                self.in_flight -= 1
            elif future in self._line:
                self._line.remove(future)
            self._admit()
            if isinstance(error, TimeoutError):
                raise ToolBusy(self.name, self.in_line) from None
            raise

    def _admit(self) -> None:
        while self._line and self._open():
            future = self._line.popleft()
            if not future.done():
                self.in_flight += 1
                future.set_result(None)

    def _close(self, until: float) -> None:
        if until <= self._closed_until:
            return
        self._closed_until = until
        if self._reopening is not None:
            self._reopening.cancel()
        self._reopening = asyncio.get_running_loop().call_later(until - self._clock(), self._reopen)

    def _reopen(self) -> None:
        self._reopening = None
        if self._clock() < self._closed_until:  # a timer may come a tick early by another clock
            self._reopening = asyncio.get_running_loop().call_later(0.01, self._reopen)
        else:
            self._admit()
