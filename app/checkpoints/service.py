"""A job's checkpoints for a client.

Does not cover: publishing and verifying their files (`store`), permissions.
"""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession

from app.checkpoints import repository
from app.core.paging import Page
from app.db.tables import Checkpoint
from app.jobs import service as jobs


async def list_checkpoints(
    session: AsyncSession, project_id: str, job_id: str, *, after: str | None, limit: int
) -> Page[Checkpoint]:
    """Newest first. Raises NotFound for the job, InvalidRequest for an unknown `after`."""
    await jobs.require(session, project_id, job_id)
    below = None
    if after is not None:
        below = await repository.step_of(session, project_id, job_id, after)
        if below is None:
            jobs.bad_cursor(after)
    return Page.of(await repository.of_job(session, project_id, job_id, below_step=below, limit=limit), limit)
