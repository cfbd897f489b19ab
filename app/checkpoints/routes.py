"""`/v1/fine_tuning/jobs/{id}/checkpoints` (contract §9).

Does not cover: checkpoint permissions, which do not exist yet.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter

from app.checkpoints import service
from app.checkpoints.schemas import CheckpointList, CheckpointObject
from app.web.deps import CallerDep, DatabaseDep, PageQuery, page

router = APIRouter(prefix="/fine_tuning/jobs/{job_id}/checkpoints")


@router.get("")
async def list_checkpoints(
    job_id: str, caller: CallerDep, database: DatabaseDep, paging: Annotated[PageQuery, page(10)]
) -> CheckpointList:
    """Checkpoints of a job, newest first; each name can be used as a model."""
    async with database.read() as session:
        found = await service.list_checkpoints(
            session, caller.project_id, job_id, after=paging.after, limit=paging.limit
        )
    shown = [CheckpointObject.of(row) for row in found.items]
    return CheckpointList(
        data=shown,
        has_more=found.has_more,
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
    )
