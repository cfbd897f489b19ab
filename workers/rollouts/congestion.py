"""How many trajectories run at once, and which goes next: as many as sampler and tools carry, and not one more.

Does not cover: one trajectory (`trajectory`), how far sampling runs ahead (`pool`), calls of one tool (`tool_gate`).

The limit grows while it binds and the sampler has room, is trimmed above 0.8 of the KV cache, and is cut by a quarter
on pre-emption, a cache over 0.9 full, or a queue that stays: at the sampler, or of calls waiting for a tool. A cut only
stops admissions. Nothing that runs is cancelled: that would select rollouts by their speed. While more run than the
limit allows, the last cut has not shown its effect, so there is no other; that is why it never runs to 0.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from app.net.clients import USER_CONNECTIONS
from app.samplers.errors import SamplerError
from app.samplers.metrics import LoadUnreadable, SamplerLoad, together
from workers.rollouts.tool_gate import ToolGate, ToolTurn

log = logging.getLogger("hone.congestion")

Priority = tuple[int, ...]

START = 64  # then doubled once a second until the first sign of congestion
ROOM, SOFT, FULL = 0.6, 0.8, 0.9  # shares of the KV cache
CUT = 0.75
TRIM = 1 / 32
QUEUE_SHARE = 0.25  # waiting / running (or calls in a tool's line / trajectories) that is congestion if it stays
QUIET_SHARE = 1 / 16  # up to this the queue counts as empty
QUEUE_STAYS = 3  # observations
POLL_S = 1.0
TICK_S = 0.05
LATE_S = 0.03  # of the event loop, in the median of a second
POLL_TIMEOUT_S = 5.0


@dataclass(eq=False)
class _Waiter:
    priority: Priority
    future: asyncio.Future[None]


@dataclass(frozen=True)
class Change:
    """The latest movement of the limit."""

    before: int
    after: int
    why: str
    at: float


@dataclass
class _Queue:
    """A queue that stays for several observations; one that comes and goes with a burst of turns is none."""

    seen: int = 0

    def stays(self, waiting: int, running: int) -> bool:
        self.seen = self.seen + 1 if waiting > max(1, QUEUE_SHARE * running) else 0
        return self.seen >= QUEUE_STAYS


@dataclass
class _Line:
    """Who waits for admission: a heap; entries of those that went or moved are skipped when they surface."""

    heap: list[tuple[Priority, int, _Waiter]] = field(default_factory=list)
    groups: dict[int, set[_Waiter]] = field(default_factory=dict)
    pushed: int = 0
    waiting: int = 0

    def push(self, waiter: _Waiter) -> None:
        self.pushed += 1
        heapq.heappush(self.heap, (waiter.priority, self.pushed, waiter))

    def pop(self) -> _Waiter | None:
        while self.heap:
            priority, _, waiter = heapq.heappop(self.heap)
            if priority == waiter.priority and not waiter.future.done():
                return waiter
        return None


class Congestion:
    """The admission of one run. `floor`: one group; `ceiling`: what the operator allows."""

    def __init__(
        self, *, floor: int, ceiling: int, start: int = START, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.ceiling = max(1, ceiling)
        self.floor = min(max(1, floor), self.ceiling)
        self.limit = min(max(start, self.floor), self.ceiling)
        self.in_flight = 0
        self.load: SamplerLoad | None = None
        self.change: Change | None = None
        self._clock = clock
        self._line = _Line()
        self._tools: dict[str, ToolGate] = {}
        self._bound = False  # somebody had to wait since the last observation
        self._probing = True  # until the first sign of congestion
        self._sampler_queue, self._tool_queue = _Queue(), _Queue()

    @property
    def waiting(self) -> int:
        return self._line.waiting

    # --- admission ---

    @asynccontextmanager
    async def slot(self, priority: Priority, group: int | None = None) -> AsyncIterator[None]:
        """Wait until a trajectory may run; the lowest priority first, then first come, first served."""
        if self.in_flight < self.limit:
            self.in_flight += 1
        else:
            await self._wait(priority, group)
        try:
            yield
        finally:
            self.in_flight -= 1
            self._admit()

    def promote(self, group: int, priority: Priority) -> None:
        """Give those of `group` that still wait another priority, as when its members begin to end."""
        for waiter in self._line.groups.get(group, ()):
            if waiter.priority != priority:
                waiter.priority = priority
                self._line.push(waiter)

    async def _wait(self, priority: Priority, group: int | None) -> None:
        line = self._line
        waiter = _Waiter(priority, asyncio.get_running_loop().create_future())
        if group is not None:
            line.groups.setdefault(group, set()).add(waiter)
        line.push(waiter)
        line.waiting += 1
        self._bound = True
        try:
            await waiter.future
        except asyncio.CancelledError:
            if waiter.future.done() and not waiter.future.cancelled():  # let in and cancelled in the same moment
                self.in_flight -= 1
                self._admit()
            raise
        finally:
            line.waiting -= 1
            if group is not None:
                line.groups[group].discard(waiter)
                if not line.groups[group]:
                    del line.groups[group]

    def _admit(self) -> None:
        while self.in_flight < self.limit and (waiter := self._line.pop()) is not None:
            self.in_flight += 1
            waiter.future.set_result(None)

    # --- tools ---

    def tool(self, name: str, deadline: float | None = None) -> AbstractAsyncContextManager[ToolTurn]:
        """A turn at this tool: `async with congestion.tool(name) as turn: await call_tool(…, watch=turn.watch)`.

        deadline by time.monotonic(). Raises ToolBusy when it passes in the line.
        """
        return self._gate(name).turn(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def _gate(self, name: str) -> ToolGate:
        gate = self._tools.get(name)
        if gate is None:
            # More could not leave anyway. Who waits here has not built its request yet: 14 KiB less for each.
            gate = self._tools[name] = ToolGate(name, USER_CONNECTIONS, self._clock)
        return gate

    # --- the limit ---

    def observe_sampler(self, load: SamplerLoad) -> None:
        """Judge once: at most one step up or down. Call it at an even pace, about once a second."""
        before, self.load = self.load, load
        preempted = 0
        if before is not None and before.samplers == load.samplers:  # a counter that comes or goes is no event
            preempted = load.preemptions - before.preemptions
        lines = {gate.name: gate.in_line for gate in self._tools.values()}
        tool = max(lines, key=lines.__getitem__, default="")
        in_line = sum(lines.values())
        queued = self._sampler_queue.stays(load.waiting, load.running)
        held_up = self._tool_queue.stays(in_line, self.in_flight)
        quiet = load.waiting <= max(1, QUIET_SHARE * load.running) and in_line <= max(1, QUIET_SHARE * self.in_flight)
        if preempted > 0:
            self._cut(CUT, f"sampler pre-empted {preempted} requests")
        elif load.kv_usage > FULL:
            self._cut(CUT, f"sampler KV cache {load.kv_usage:.0%} full")
        elif queued:
            self._cut(CUT, f"sampler queue {load.waiting} waiting, {load.running} running")
        elif held_up:
            gate = self._tools[tool]
            self._cut(CUT, f"{gate.in_line} calls wait for tool {tool} ({gate.why or f'{gate.limit} at once'})")
        elif load.kv_usage > SOFT:
            self._cut(1 - TRIM, f"sampler KV cache {load.kv_usage:.0%} full")
        elif load.kv_usage < ROOM and quiet and (self._bound or self.waiting):
            self._grow("sampler and tools have room")
        self._bound = False

    def observe_nothing(self) -> None:
        """No load could be had. One that was once known may come back: wait for it; else only the ceiling bounds."""
        if self.load is None and (self._bound or self.waiting):
            self._grow("the sampler does not tell its load")
        self._bound = False

    def observe_loop(self, late_s: float) -> None:
        """Fewer calls at once of tools whose calls wait for nothing but our own event loop."""
        if late_s > LATE_S:
            for gate in self._tools.values():
                gate.relieve(late_s)

    def _grow(self, why: str) -> None:
        self._set(min(self.ceiling, 2 * self.limit if self._probing else self.limit + self.floor), why)
        self._admit()

    def _cut(self, share: float, why: str) -> None:
        self._probing = False
        if self.in_flight > self.limit:
            return
        self._sampler_queue.seen = self._tool_queue.seen = 0
        # From what runs, not from a limit that nobody has reached.
        used = min(self.limit, max(self.in_flight, self.floor))
        self._set(max(self.floor, int(share * used)), why)

    def _set(self, limit: int, why: str) -> None:
        if limit != self.limit:
            log.info("rollouts in flight: limit %d -> %d (%s)", self.limit, limit, why)
            self.change = Change(self.limit, limit, why, self._clock())
            self.limit = limit

    async def poll(self, loads: Callable[[], Awaitable[Sequence[SamplerLoad]]]) -> None:
        """Ask for the samplers' loads once a second until cancelled. One that is away moves nothing."""
        while True:
            try:
                async with asyncio.timeout(POLL_TIMEOUT_S):
                    found = await loads()
            except (SamplerError, LoadUnreadable, TimeoutError) as error:
                log.debug("no load of the sampler: %s", error)
                found = ()
            if found:
                self.observe_sampler(together(found))
            else:
                self.observe_nothing()
            self.observe_loop(await _lateness())

    def describe(self) -> dict[str, Any]:
        """For the job's `hone` object: limits in force and what set them."""
        change, load = self.change, self.load
        return {
            "limit": self.limit,
            "in_flight": self.in_flight,
            "waiting": self.waiting,
            "last_change": None
            if change is None
            else {
                "from": change.before,
                "to": change.after,
                "why": change.why,
                "age_s": round(self._clock() - change.at, 1),
            },
            "sampler": None
            if load is None
            else {"running": load.running, "waiting": load.waiting, "kv_usage": round(load.kv_usage, 3)},
            "tools": {
                gate.name: {"limit": gate.limit, "in_flight": gate.in_flight, "waiting": gate.in_line, "why": gate.why}
                for gate in self._tools.values()
                if gate.why is not None
            },
        }


async def _lateness() -> float:
    """How late the event loop comes to a timer: the median over a second, in seconds."""
    loop = asyncio.get_running_loop()
    late, until = [], loop.time() + POLL_S
    while (due := loop.time() + TICK_S) < until + TICK_S:
        await asyncio.sleep(TICK_S)
        late.append(loop.time() - due)
    return statistics.median(late)
