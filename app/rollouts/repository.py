"""Reading the ledger: one rollout, or a filtered page of a job's.

Does not cover: its writes (`ledger`) and the counts by state (`app.jobs.repository`).
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, not_, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.states import RolloutState
from app.db.tables import Rollout
from app.rollouts.schemas import RolloutQuery


async def get(session: AsyncSession, project_id: str, job_id: str, rollout_id: str) -> Rollout | None:
    query = select(Rollout).where(Rollout.id == rollout_id, Rollout.job_id == job_id, Rollout.project_id == project_id)
    return (await session.scalars(query)).one_or_none()


async def page(
    session: AsyncSession, project_id: str, job_id: str, asked: RolloutQuery, after: int | None
) -> Sequence[Rollout]:
    """In the order they were started, newest first unless `asc`; `after` is a seq; up to `limit + 1`."""
    ascending = asked.order == "asc"
    query = select(Rollout).where(Rollout.job_id == job_id, Rollout.project_id == project_id, *_filters(asked))
    if after is not None:
        query = query.where(Rollout.seq > after if ascending else Rollout.seq < after)
    query = query.order_by(Rollout.seq if ascending else Rollout.seq.desc()).limit(asked.limit + 1)
    return (await session.scalars(query)).all()


def _filters(asked: RolloutQuery) -> list[ColumnElement[bool]]:
    exact = {
        Rollout.step: asked.step,
        Rollout.split: asked.split,
        Rollout.state: asked.state,
        Rollout.greedy: asked.greedy,
        Rollout.row: asked.row,
    }
    found: list[ColumnElement[bool]] = [column == value for column, value in exact.items() if value is not None]
    if asked.min_reward is not None:
        found.append(Rollout.reward >= asked.min_reward)
    if asked.max_reward is not None:
        found.append(Rollout.reward <= asked.max_reward)
    if asked.tool_error is not None:
        wrong = or_(Rollout.invalid_calls > 0, Rollout.state == RolloutState.TOOL_FAILED)
        found.append(wrong if asked.tool_error else not_(wrong))
    return found
