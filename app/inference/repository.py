"""The SQL of the inference room: which adapter a model name of a project means.

Does not cover: base models (a folder, `app.models.catalogue`) and live samplers (`app.samplers`).
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.tables import Checkpoint, Job


@dataclass(frozen=True)
class Tuned:
    """A checkpoint that can be served: its id is the adapter's name, so a name never means two directories."""

    checkpoint_id: str
    path: str
    base_model: str


async def find_tuned(session: AsyncSession, project_id: str, name: str) -> Tuned | None:
    """The checkpoint of that name, or the last checkpoint of the job whose result has that name; None: neither."""
    columns = (Checkpoint.id, Checkpoint.path, Checkpoint.base_model)
    by_name = select(*columns).where(Checkpoint.project_id == project_id, Checkpoint.name == name)
    by_job = (
        select(*columns)
        .join(Job, Job.id == Checkpoint.job_id)
        .where(Job.project_id == project_id, Job.fine_tuned_model == name)
        .order_by(Checkpoint.step.desc())
        .limit(1)
    )
    for statement in (by_name, by_job):
        row = (await session.execute(statement)).first()
        if row is not None:
            return Tuned(checkpoint_id=row.id, path=row.path, base_model=row.base_model)
    return None
