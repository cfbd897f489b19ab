"""Many trajectories at once: groups of siblings, the groups of a step, a validation pass; several of these together.

Does not cover: one trajectory (`trajectory`), what a group is worth (`batch`), how many run at once (`congestion`), and
which steps are sampled ahead (`pipeline`).

Zero-variance and dropped groups are replaced by fresh rows while the step's budget lasts (one extra batch). When half
of the latest rollouts are infrastructure failures the job stops with the last error: never a hang, never a 0.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from app.core.ids import new_trace_id
from app.core.states import INFRASTRUCTURE
from workers.rollouts.batch import Verdict, judge
from workers.rollouts.recorder import Recorder
from workers.rollouts.stream import RowStream
from workers.rollouts.trajectory import Setting, run_rollout
from workers.rollouts.types import Ended, Group, RolloutKey, Row, Trajectory

Priority = tuple[int, ...]


class Admission(Protocol):
    """Lets trajectories in, the lowest priority value first; `promote` changes that of a group that still waits."""

    def slot(self, priority: Priority, group: int | None = None) -> AbstractAsyncContextManager[None]: ...

    def promote(self, group: int, priority: Priority) -> None: ...


class TooManyFailures(Exception):
    """Half of the last `window` rollouts ended by infrastructure faults; the message carries the last one's words."""

    def __init__(self, count: int, window: int, state: str, error: str) -> None:
        super().__init__(f"{count} of the last {window} rollouts were discarded ({state}); the last: {error}")
        self.state = state


@dataclass
class StepRollouts:
    """All groups of one training step, with the verdict on each; all of them were sampled at `version`."""

    step: int
    version: int
    groups: list[tuple[Group, Verdict]]
    positions: list[int]  # of the row stream
    wall_s: float

    def of(self, verdict: Verdict) -> list[Group]:
        return [group for group, found in self.groups if found is verdict]

    @property
    def members(self) -> list[Ended]:
        return [member for group, _ in self.groups for member in group.members]


@dataclass
class _Tally:
    """How far a step's sampling, or a validation pass, has come."""

    label: str
    total: int = 0
    done: int = 0

    def __str__(self) -> str:
        return f"{self.label}: {self.done} of {self.total} rollouts done"


@dataclass
class _Siblings:
    """How many of a group are still open: the fewer, the sooner the rest is let in, earlier steps first."""

    open: int

    def priority(self, key: RolloutKey) -> Priority:
        return key.step, self.open, key.group


@dataclass
class _Idle:
    """Seconds without a single trajectory in flight."""

    total: float = 0.0
    since: float | None = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        return self.total + (time.monotonic() - self.since if self.since is not None else 0.0)

    def busy(self) -> None:
        if self.since is not None:
            self.total, self.since = self.seconds(), None

    def idle(self) -> None:
        self.since = time.monotonic()


class Pool:
    """One per run; `step` and `evaluate` may run side by side and share the admission."""

    def __init__(self, setting: Setting, recorder: Recorder, admission: Admission, *, group_size: int) -> None:
        self._setting = setting
        self._recorder = recorder
        self._group_size = group_size
        self._admission = admission
        self._recent: deque[bool] = deque(maxlen=max(16, 2 * group_size))  # was it an infrastructure fault?
        self._groups = 0
        self._tallies: list[_Tally] = []
        self._idle = _Idle()
        self.active: dict[str, Trajectory] = {}

    async def step(self, step: int, version: int, stream: RowStream, batch_size: int) -> StepRollouts:
        """Groups for one step: `batch_size` of them, plus replacements for those that teach nothing."""
        began = time.monotonic()
        tally = self._tally(f"step {step}")
        spare = batch_size
        found: list[tuple[Group, Verdict]] = []
        positions: list[int] = []
        running: set[asyncio.Task[Group]] = set()

        async def launch(count: int) -> set[asyncio.Task[Group]]:
            taken = [stream.take() for _ in range(count)]
            positions.extend(position for position, _ in taken)
            return await self._launch([row for _, row in taken], step, version, tally)

        try:
            running |= await launch(batch_size)
            while running:
                finished, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                # gather, because several may have failed: it takes note of all their exceptions.
                found += [(group, judge(group, self._group_size)) for group in await asyncio.gather(*finished)]
                good = sum(verdict is Verdict.TRAINABLE for _, verdict in found)
                missing = min(batch_size - good - len(running), spare)
                if missing > 0:
                    spare -= missing
                    running |= await launch(missing)
        finally:
            self._tallies.remove(tally)
            await _cancel(running)
        return StepRollouts(step, version, found, positions, time.monotonic() - began)

    async def evaluate(
        self, rows: Sequence[Row], step: int, version: int, *, samples: int, greedy: bool
    ) -> list[Ended]:
        """One validation pass: `samples` rollouts per row at one version; never trained on."""
        plan = []
        for row in rows:
            self._groups += 1
            for sample in range(samples):
                key = RolloutKey(new_trace_id(), step, "valid", row.index, self._groups, sample, version, greedy=greedy)
                plan.append((key, row))
        tally = self._tally(f"{'greedy' if greedy else 'sampled'} validation of step {step}")
        tally.total = len(plan)
        tasks: list[asyncio.Task[Ended]] = []
        try:
            await self._recorder.start([key for key, _ in plan])
            # A checkpoint and, before long, the next step's record wait for it: ahead of the steps that come after.
            tasks += [asyncio.create_task(self._one(key, row, _Siblings(0), tally)) for key, row in plan]
            return list(await asyncio.gather(*tasks))
        finally:
            self._tallies.remove(tally)
            await _cancel(tasks)

    async def _launch(self, rows: Sequence[Row], step: int, version: int, tally: _Tally) -> set[asyncio.Task[Group]]:
        plan: list[tuple[Row, int, list[RolloutKey]]] = []
        for row in rows:
            self._groups += 1
            number = self._groups
            keys = [
                RolloutKey(new_trace_id(), step, "train", row.index, number, sample, version)
                for sample in range(self._group_size)
            ]
            plan.append((row, number, keys))
        await self._recorder.start([key for _, _, keys in plan for key in keys])
        tally.total += sum(len(keys) for _, _, keys in plan)
        return {asyncio.create_task(self._group(row, number, version, keys, tally)) for row, number, keys in plan}

    async def _group(self, row: Row, number: int, version: int, keys: Sequence[RolloutKey], tally: _Tally) -> Group:
        siblings = _Siblings(len(keys))
        tasks = [asyncio.create_task(self._one(key, row, siblings, tally)) for key in keys]
        try:
            members = await asyncio.gather(*tasks)
        finally:
            await _cancel(tasks)
        return Group(row, number, version, members)

    async def _one(self, key: RolloutKey, row: Row, siblings: _Siblings, tally: _Tally) -> Ended:
        trajectory = Trajectory(activity_since=time.monotonic())
        queued = time.monotonic()
        async with self._admission.slot(siblings.priority(key), key.group):
            trajectory.seconds["queue"] = time.monotonic() - queued
            self.active[key.id] = trajectory
            self._idle.busy()
            try:
                ended = await run_rollout(self._setting, key, row, trajectory)
            finally:
                del self.active[key.id]
                if not self.active:
                    self._idle.idle()
        tally.done += 1
        siblings.open -= 1
        self._admission.promote(key.group, siblings.priority(key))
        self._recorder.ended(ended, row)
        self._count(ended)
        return ended

    def _count(self, ended: Ended) -> None:
        window = self._recent
        window.append(ended.state in INFRASTRUCTURE)
        # Not only runs of failures: rollouts that call no tool succeed in between while the tool is down.
        if window[-1] and len(window) == window.maxlen and 2 * sum(window) >= len(window):
            raise TooManyFailures(sum(window), len(window), str(ended.state), ended.error or "")

    def _tally(self, label: str) -> _Tally:
        tally = _Tally(label)
        self._tallies.append(tally)
        return tally

    @property
    def idle_s(self) -> float:
        """Seconds so far in which nothing was in flight."""
        return self._idle.seconds()

    def describe(self) -> str | None:
        """The line people read while it runs; None when nothing does."""
        if not self._tallies:
            return None
        text = "; ".join(str(tally) for tally in self._tallies)
        waiting = [t for t in self.active.values() if t.activity.startswith("waiting for")]
        if waiting:
            slowest = min(waiting, key=lambda t: t.activity_since)
            age = time.monotonic() - slowest.activity_since
            if age >= 2.0:
                text += f"; the slowest is {slowest.activity} since {age:.0f} s"
        return text


async def _cancel(tasks: object) -> None:
    pending = [task for task in tasks if isinstance(task, asyncio.Task) and not task.done()]  # type: ignore[attr-defined]
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
