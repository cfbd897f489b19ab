"""The SQL of the models list: names that fine-tuning jobs made.

Does not cover: base models, which are directories (`catalogue`), nor which adapter a name means (`app.inference`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.tables import Checkpoint, Job


@dataclass(frozen=True)
class Tuned:
    """A name that can be served, and when it came to be."""

    name: str
    created_at: float


async def tuned(session: AsyncSession, project_id: str, name: str | None = None) -> Sequence[Tuned]:
    """Results of jobs and checkpoints, newest first; only the one called `name` when given."""
    results = select(Job.fine_tuned_model, func.coalesce(Job.finished_at, Job.created_at)).where(
        Job.project_id == project_id, Job.fine_tuned_model.is_not(None)
    )
    checkpoints = select(Checkpoint.name, Checkpoint.created_at).where(Checkpoint.project_id == project_id)
    if name is not None:
        results = results.where(Job.fine_tuned_model == name)
        checkpoints = checkpoints.where(Checkpoint.name == name)
    found: dict[str, float] = {}
    for row in (*await session.execute(results), *await session.execute(checkpoints)):
        found.setdefault(str(row[0]), row[1])
    return [Tuned(key, at) for key, at in sorted(found.items(), key=lambda item: (-item[1], item[0]))]
