"""Sampling ahead of training: the batches of the next steps are collected while the trainer works on this one.

Does not cover: one step's groups (`workers.rollouts.pool`), and the update itself (`workers.run`).

Step k is trained at version k - 1, so it may be collected from version k - 1 - max_staleness on: its collection opens
when step k - 1 - max_staleness is done and is pinned to the newest version of that moment. A step waits for all of its
groups (design §6.6): no slow rollout is dropped or overtaken, which would teach the model to be fast by selection.
With max_staleness 0 exactly one collection is open, at the version that is trained next: strictly on-policy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Set

from workers.rollouts.pool import Pool, StepRollouts
from workers.rollouts.stream import RowStream


class Pipeline:
    """One per run. `advance` after every step, `next` for the batch of the step after it; `close` at the end."""

    def __init__(self, pool: Pool, stream: RowStream, *, batch_size: int, total_steps: int, max_staleness: int) -> None:
        self._pool = pool
        self._stream = stream
        self._batch_size = batch_size
        self._total_steps = total_steps
        self._max_staleness = max_staleness
        self._open: dict[int, tuple[int, asyncio.Task[StepRollouts]]] = {}  # step → version, collection
        self._opened = 0

    def advance(self, done: int, version: int) -> None:
        """Step `done` is trained and `version` is served: open every collection that may now be sampled from it."""
        last = min(done + 1 + self._max_staleness, self._total_steps)
        for step in range(max(self._opened, done) + 1, last + 1):
            work = self._pool.step(step, version, self._stream, self._batch_size)
            self._open[step] = (version, asyncio.create_task(work, name=f"collect step {step}"))
            self._opened = step

    async def next(self, step: int) -> StepRollouts:
        """The rollouts of `step`, once all of its groups have ended. Raises what ended any open collection."""
        _, wanted = self._open[step]
        pending = {task for _, task in self._open.values()}
        while not wanted.done():
            finished, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                task.result()
        del self._open[step]
        return wanted.result()

    def versions(self) -> Set[int]:
        """Versions that open collections are sampled from."""
        return {version for version, _ in self._open.values()}

    async def close(self) -> None:
        """Cancel what is open; nothing of it is recorded as ended."""
        tasks = [task for _, task in self._open.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
