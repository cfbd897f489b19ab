"""A job's rollouts for a client: the page, and one with its whole trace.

Does not cover: recording them (`ledger`, `traces`).
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncSession

from app.core.errors import NotFound, Unavailable
from app.core.paging import Page
from app.db.tables import Rollout
from app.jobs import service as jobs
from app.rollouts import repository
from app.rollouts.schemas import RolloutQuery, RolloutWithTrace
from app.rollouts.traces import TraceMissing, read_trace

READ_S = 20.0


async def list_rollouts(session: AsyncSession, project_id: str, job_id: str, asked: RolloutQuery) -> Page[Rollout]:
    """Raises NotFound for the job, InvalidRequest for an unknown `after`."""
    await jobs.require(session, project_id, job_id)
    after = None
    if asked.after is not None:
        last = await repository.get(session, project_id, job_id, asked.after)
        if last is None:
            jobs.bad_cursor(asked.after)
        after = last.seq
    return Page.of(await repository.page(session, project_id, job_id, asked, after), asked.limit)


async def get(session: AsyncSession, project_id: str, job_id: str, rollout_id: str) -> Rollout:
    """Raises NotFound for the job or the rollout."""
    await jobs.require(session, project_id, job_id)
    rollout = await repository.get(session, project_id, job_id, rollout_id)
    if rollout is None:
        raise NotFound(f"Could not find rollout: {rollout_id[:100]}", param="rollout_id", code="rollout_not_found")
    return rollout


async def with_trace(rollout: Rollout, traces_dir: Path) -> RolloutWithTrace:
    """The row and `trace`: null while it runs, null with `trace_error` when the file is gone. Holds no session."""
    file, offset, length = rollout.trace_file, rollout.trace_offset, rollout.trace_length
    if file is None or offset is None or length is None:
        return RolloutWithTrace.around(rollout, None)
    try:
        async with asyncio.timeout(READ_S):
            trace = await asyncio.to_thread(read_trace, traces_dir, file, offset, length)
    except TraceMissing:
        return RolloutWithTrace.around(rollout, None, "the stored trace is gone or damaged; the row remains")
    except TimeoutError:
        raise Unavailable("The trace could not be read in time; try again.") from None
    return RolloutWithTrace.around(rollout, trace)
