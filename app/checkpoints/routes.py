"""`/v1/fine_tuning/jobs/{id}/checkpoints` (contract §9).

Does not cover: checkpoint permissions, which do not exist yet.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter

from app.checkpoints import service
from app.checkpoints.schemas import checkpoint_object
from app.core.paging import envelope
from app.web.deps import CallerDep, DatabaseDep, PageQuery, page

router = APIRouter(prefix="/fine_tuning/jobs/{job_id}/checkpoints")


@router.get("")
async def list_checkpoints(
    job_id: str, caller: CallerDep, database: DatabaseDep, paging: Annotated[PageQuery, page(10)]
) -> dict[str, Any]:
    """Checkpoints of a job, newest first; each name can be used as a model."""
    async with database.read() as session:
        found = await service.list_checkpoints(
            session, caller.project_id, job_id, after=paging.after, limit=paging.limit
        )
    return envelope([checkpoint_object(checkpoint) for checkpoint in found.items], found.has_more)
