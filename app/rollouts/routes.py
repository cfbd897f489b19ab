"""`/v1/fine_tuning/jobs/{id}/rollouts`: every trajectory and its trace (an addition to OpenAI's API).

Does not cover: export and re-grading. From the SDK: `client.get(path, cast_to=object)`.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from app.rollouts import service
from app.rollouts.schemas import RolloutList, RolloutObject, RolloutQuery, RolloutWithTrace
from app.web.deps import CallerDep, DatabaseDep, TracesDep

router = APIRouter(prefix="/fine_tuning/jobs/{job_id}/rollouts")


@router.get("")
async def list_rollouts(
    job_id: str, caller: CallerDep, database: DatabaseDep, asked: Annotated[RolloutQuery, Query()]
) -> RolloutList:
    """Rollouts of a job, newest first, filtered."""
    async with database.read() as session:
        found = await service.list_rollouts(session, caller.project_id, job_id, asked)
    shown = [RolloutObject.of(row) for row in found.items]
    return RolloutList(
        data=shown,
        has_more=found.has_more,
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
    )


@router.get("/{rollout_id}")
async def retrieve_rollout(
    job_id: str, rollout_id: str, caller: CallerDep, database: DatabaseDep, traces: TracesDep
) -> RolloutWithTrace:
    """One rollout with its trace: messages, tokens, log-probs, tool calls, grade."""
    async with database.read() as session:
        rollout = await service.get(session, caller.project_id, job_id, rollout_id)
    return await service.with_trace(rollout, traces)
