"""Many trajectories at once: groups of siblings, a step's worth of groups, a validation pass.

Does not cover: one trajectory (`trajectory`), and what a group is worth (`batch`).

Zero-variance and dropped groups are replaced by fresh rows while the step's budget lasts (one extra batch). When half
of the latest rollouts are infrastructure failures the job stops with the last error: never a hang, never a 0.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from app.core.ids import new_trace_id
from app.core.states import INFRASTRUCTURE
from workers.rollouts.batch import Verdict, judge
from workers.rollouts.recorder import Recorder
from workers.rollouts.stream import RowStream
from workers.rollouts.trajectory import Setting, run_rollout
from workers.rollouts.types import Ended, Group, RolloutKey, Row, Trajectory


class TooManyFailures(Exception):
    """Half of the last `window` rollouts ended by infrastructure faults; the message carries the last one's words."""

    def __init__(self, count: int, window: int, state: str, error: str) -> None:
        super().__init__(f"{count} of the last {window} rollouts were discarded ({state}); the last: {error}")
        self.state = state


@dataclass
class StepRollouts:
    """All groups of one training step, with the verdict on each."""

    groups: list[tuple[Group, Verdict]]
    wall_s: float

    def of(self, verdict: Verdict) -> list[Group]:
        return [group for group, found in self.groups if found is verdict]


class Pool:
    """One per run. `limit`: rollouts in flight."""

    def __init__(self, setting: Setting, recorder: Recorder, *, group_size: int, limit: int) -> None:
        self._setting = setting
        self._recorder = recorder
        self._group_size = group_size
        self._slots = asyncio.Semaphore(limit)
        self._recent: deque[bool] = deque(maxlen=max(16, 2 * group_size))  # was it an infrastructure fault?
        self._groups = 0
        self.active: dict[str, Trajectory] = {}
        self.total = 0
        self.done = 0

    async def step(self, step: int, version: int, stream: RowStream, batch_size: int) -> StepRollouts:
        """Groups for one step: `batch_size` of them, plus replacements for those that teach nothing."""
        began = time.monotonic()
        self.total = self.done = 0
        spare = batch_size
        found: list[tuple[Group, Verdict]] = []
        running = await self._launch([stream.take() for _ in range(batch_size)], step, version)
        try:
            while running:
                finished, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in finished:
                    group = task.result()
                    found.append((group, judge(group, self._group_size)))
                good = sum(verdict is Verdict.TRAINABLE for _, verdict in found)
                missing = min(batch_size - good - len(running), spare)
                if missing > 0:
                    spare -= missing
                    running |= await self._launch([stream.take() for _ in range(missing)], step, version)
        finally:
            await _cancel(running)
        return StepRollouts(found, time.monotonic() - began)

    async def evaluate(
        self, rows: Sequence[Row], step: int, version: int, *, samples: int, greedy: bool
    ) -> list[Ended]:
        """One validation pass: `samples` rollouts per row at one version; never trained on."""
        self.total = self.done = 0
        plan = []
        for row in rows:
            self._groups += 1
            for sample in range(samples):
                key = RolloutKey(new_trace_id(), step, "valid", row.index, self._groups, sample, version, greedy=greedy)
                plan.append((key, row))
        await self._recorder.start([key for key, _ in plan])
        self.total = len(plan)
        tasks = [asyncio.create_task(self._one(key, row)) for key, row in plan]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            await _cancel(tasks)

    async def _launch(self, rows: Sequence[Row], step: int, version: int) -> set[asyncio.Task[Group]]:
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
        self.total += sum(len(keys) for _, _, keys in plan)
        return {asyncio.create_task(self._group(row, number, version, keys)) for row, number, keys in plan}

    async def _group(self, row: Row, number: int, version: int, keys: Sequence[RolloutKey]) -> Group:
        tasks = [asyncio.create_task(self._one(key, row)) for key in keys]
        try:
            members = await asyncio.gather(*tasks)
        finally:
            await _cancel(tasks)
        return Group(row, number, version, members)

    async def _one(self, key: RolloutKey, row: Row) -> Ended:
        trajectory = Trajectory(activity_since=time.monotonic())
        async with self._slots:
            self.active[key.id] = trajectory
            try:
                ended = await run_rollout(self._setting, key, row, trajectory)
            finally:
                del self.active[key.id]
        self.done += 1
        self._recorder.ended(ended, row)
        self._count(ended)
        return ended

    def _count(self, ended: Ended) -> None:
        window = self._recent
        window.append(ended.state in INFRASTRUCTURE)
        # Not only runs of failures: rollouts that call no tool succeed in between while the tool is down.
        if window[-1] and len(window) == window.maxlen and 2 * sum(window) >= len(window):
            raise TooManyFailures(sum(window), len(window), str(ended.state), ended.error or "")

    def describe(self) -> str:
        """The line people read while it runs."""
        text = f"{self.done} of {self.total} rollouts done"
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
