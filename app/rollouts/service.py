"""A job's rollouts for a client: the page, and one with its whole trace.

Does not cover: recording them (`ledger`, `traces`).
"""

from __future__ import annotations

import asyncio
import logging

from sqlalchemy.ext.asyncio import AsyncSession

from app.core.errors import NotFound, Unavailable
from app.core.paging import Page
from app.db.tables import Rollout
from app.jobs import service as jobs
from app.rollouts import repository
from app.rollouts.schemas import RolloutQuery, RolloutWithTrace
from app.rollouts.traces import TraceDamaged, TraceMissing, Traces

log = logging.getLogger(__name__)

READ_S = 20.0
GONE = "the stored trace is gone (HONE_TRACES_MAX_MB_PER_JOB), or comes when its step is done; the row remains"
DAMAGED = "the stored trace is damaged; the row remains"


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


async def with_trace(rollout: Rollout, traces: Traces) -> RolloutWithTrace:
    """The row and `trace`: null while it runs, null with `trace_error` when it cannot be read. Holds no session.

    Raises Unavailable, StorageUnavailable.
    """
    file, offset, length = rollout.trace_file, rollout.trace_offset, rollout.trace_length
    if file is None or offset is None or length is None:
        return RolloutWithTrace.around(rollout, None)
    try:
        async with asyncio.timeout(READ_S):
            trace = await asyncio.to_thread(traces.read, file, offset, length)
    except TraceMissing:
        return RolloutWithTrace.around(rollout, None, GONE)
    except TraceDamaged as error:
        log.error("rollout %s: its trace is not served: %s", rollout.id, error)
        return RolloutWithTrace.around(rollout, None, DAMAGED)
    except TimeoutError:
        raise Unavailable("The trace could not be read in time; try again.") from None
    if trace.get("id", rollout.id) != rollout.id:  # its file was removed, and a rollout that ended late made it anew
        return RolloutWithTrace.around(rollout, None, GONE)
    return RolloutWithTrace.around(rollout, trace)
