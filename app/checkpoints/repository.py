"""Reading checkpoint rows of one project.

Does not cover: registering them, which a worker does in a fenced transaction.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.tables import Checkpoint


async def step_of(session: AsyncSession, project_id: str, job_id: str, checkpoint_id: str) -> int | None:
    return await session.scalar(
        select(Checkpoint.step).where(
            Checkpoint.id == checkpoint_id, Checkpoint.job_id == job_id, Checkpoint.project_id == project_id
        )
    )


async def of_job(
    session: AsyncSession, project_id: str, job_id: str, *, below_step: int | None, limit: int
) -> Sequence[Checkpoint]:
    """Newest first: a job has one a step, and steps only grow. Up to `limit + 1`."""
    query = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.project_id == project_id)
    if below_step is not None:
        query = query.where(Checkpoint.step < below_step)
    return (await session.scalars(query.order_by(Checkpoint.step.desc()).limit(limit + 1))).all()


async def by_name(session: AsyncSession, project_id: str, name: str) -> Checkpoint | None:
    """The checkpoint that the model name `name` stands for."""
    query = select(Checkpoint).where(Checkpoint.name == name, Checkpoint.project_id == project_id)
    return (await session.scalars(query)).one_or_none()
