"""The SQL of the inference room: which adapter a model name of a project means.

Does not cover: base models (a folder, `app.models.catalogue`) and live samplers (`app.samplers`).
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.checkpoints.library import Reference
from app.checkpoints.store import key_of
from app.db.tables import Checkpoint, Job


@dataclass(frozen=True)
class Tuned:
    """A checkpoint that can be served: its id is the adapter's name, so a name never means two directories."""

    checkpoint_id: str
    base_model: str
    files: Reference


async def find_tuned(session: AsyncSession, project_id: str, name: str) -> Tuned | None:
    """The checkpoint of that name, or the last checkpoint of the job whose result has that name; None: neither."""
    by_name = select(Checkpoint).where(Checkpoint.project_id == project_id, Checkpoint.name == name)
    by_job = (
        select(Checkpoint)
        .join(Job, Job.id == Checkpoint.job_id)
        .where(Job.project_id == project_id, Job.fine_tuned_model == name)
        .order_by(Checkpoint.step.desc())
        .limit(1)
    )
    for statement in (by_name, by_job):
        row = (await session.scalars(statement)).first()
        if row is not None:
            files = Reference(row.path, key_of(row.job_id, row.attempt, row.step), row.sha256)
            return Tuned(checkpoint_id=row.id, base_model=row.base_model, files=files)
    return None
