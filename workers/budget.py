"""A run against its job's budget of GPU hours (`hone.max_gpu_hours`): asked before each step.

Does not cover: counting (`app.jobs.meter`), and what becomes of the job (`workers.supervisor` pauses it).
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from app.db.engine import Database, now
from app.db.tables import Job
from app.jobs import leases, meter


class BudgetSpent(Exception):
    """`data`: the numbers, for the event."""

    def __init__(self, spent_s: float, limit_s: float, gpus: int) -> None:
        spent, limit = spent_s / meter.HOUR_S, limit_s / meter.HOUR_S
        super().__init__(
            f"{spent:.4g} GPU hours are spent, the budget is {limit:.4g} (hone.max_gpu_hours); resume the job to grant "
            "as much again"
        )
        self.data: dict[str, Any] = {"gpu_hours": round(spent, 6), "max_gpu_hours": round(limit, 6), "gpus": gpus}


class Budget:
    """One per run."""

    def __init__(self, database: Database, fence: leases.Fence) -> None:
        self._database = database
        self._fence = fence

    async def holds(self, gpus: int) -> None:
        """What the hours of this attempt are multiplied by, from its beginning. Raises `LeaseLost`."""
        async with self._database.begin() as session:
            await leases.fenced(session, self._fence, gpus=max(1, gpus))

    async def check(self) -> None:
        """Raises `BudgetSpent`."""
        async with self._database.read() as session:
            job, at = (await session.execute(select(Job, now()).where(Job.id == self._fence.job_id))).one()
        limit = meter.limit_s(job)
        if limit is not None and (spent := meter.spent_s(job, at)) >= limit:
            raise BudgetSpent(spent, limit, job.gpus)
