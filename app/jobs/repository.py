"""All SQL of the job slice that is a client's: insert, look up, list, counts, cancel, pause, resume. Per project.

Does not cover: a worker's writes (`leases`) and the reconciler's (`reconcile`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, String, case, cast, exists, func, insert, or_, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.states import TERMINAL, JobStatus
from app.db.engine import now, rows_changed
from app.db.tables import Event, File, Job, Rollout
from app.jobs import leases

Counts = dict[str, dict[str, int]]  # job id → rollout state → number


async def clock(session: AsyncSession) -> float:
    """The database's time: what ages and estimates are measured with."""
    return float((await session.execute(select(now()))).scalar_one())


async def file(session: AsyncSession, project_id: str, file_id: str) -> File | None:
    return (await session.scalars(select(File).where(File.id == file_id, File.project_id == project_id))).one_or_none()


async def add(session: AsyncSession, **values: Any) -> None:
    """Insert a job. Absent values become SQL NULL, which a None in a JSON column would not."""
    await session.execute(
        insert(Job).values(
            created_at=now(),
            attempt=0,
            crashes=0,
            reserved_slots=0,
            gpus=1,
            gpu_seconds=0.0,
            step=0,
            trained_tokens=0,
            result_files=[],
            seconds={},
            **{name: value for name, value in values.items() if value is not None},
        )
    )


async def get(session: AsyncSession, project_id: str, job_id: str) -> Job | None:
    return (await session.scalars(select(Job).where(Job.id == job_id, Job.project_id == project_id))).one_or_none()


async def list_jobs(
    session: AsyncSession, project_id: str, *, after: Job | None, limit: int, metadata: Mapping[str, str] | None
) -> Sequence[Job]:
    """Newest first, up to `limit + 1`. `metadata`: pairs that must all be there; None = no filter; {} = without any."""
    query = select(Job).where(Job.project_id == project_id)
    if after is not None:
        query = query.where(tuple_(Job.created_at, Job.id) < tuple_(after.created_at, after.id))
    if metadata is not None and not metadata:
        stored = cast(Job.user_metadata, String)
        query = query.where(or_(Job.user_metadata.is_(None), stored.in_(["{}", "null"])))
    for key, value in (metadata or {}).items():
        query = query.where(_has_pair(session, key, value))
    query = query.order_by(Job.created_at.desc(), Job.id.desc()).limit(limit + 1)
    return (await session.scalars(query)).all()


def _has_pair(session: AsyncSession, key: str, value: str) -> ColumnElement[bool]:
    """Through a table of pairs and not through a JSON path, so that no character of a key needs quoting."""
    each = func.json_each if session.get_bind().dialect.name == "sqlite" else func.json_each_text
    pairs = each(Job.user_metadata).table_valued("key", "value")
    return exists(select(1).select_from(pairs).where(pairs.c.key == key, pairs.c.value == value))


async def rollout_counts(session: AsyncSession, job_ids: Sequence[str]) -> Counts:
    """How many rollouts of each job are in which state: the ledger's sum."""
    query = (
        select(Rollout.job_id, Rollout.state, func.count())
        .where(Rollout.job_id.in_(job_ids))
        .group_by(Rollout.job_id, Rollout.state)
    )
    counts: Counts = {job_id: {} for job_id in job_ids}
    for job_id, state, number in (await session.execute(query)).all():
        counts[job_id][state] = number
    return counts


async def cancel(session: AsyncSession, project_id: str, job_id: str) -> bool:
    """Any open status → cancelled. Raising `attempt` shuts the worker out at once (design §4.2)."""
    changed = await rows_changed(
        session,
        update(Job)
        .where(Job.id == job_id, Job.project_id == project_id, Job.status.not_in([s.value for s in TERMINAL]))
        .values(
            status=JobStatus.CANCELLED,
            attempt=Job.attempt + 1,
            queue_reason=None,
            finished_at=now(),
            **leases.given_up(),
        ),
    )
    return changed == 1


async def pause(session: AsyncSession, project_id: str, job_id: str) -> bool:
    """queued or running → paused. A running job's `attempt` goes up, which shuts its worker out as cancel does."""
    running = Job.status == JobStatus.RUNNING
    changed = await rows_changed(
        session,
        update(Job)
        .where(Job.id == job_id, Job.project_id == project_id, Job.status.in_([JobStatus.QUEUED, JobStatus.RUNNING]))
        .values(
            status=JobStatus.PAUSED,
            attempt=case((running, Job.attempt + 1), else_=Job.attempt),
            queue_reason=None,
            **{**leases.given_up(), "activity": "paused by a client", "activity_at": now()},
        ),
    )
    return changed == 1


async def resume(session: AsyncSession, project_id: str, job_id: str, gpu_seconds_limit: float | None) -> bool:
    """paused → queued. The crash budget starts anew: somebody looked at the job and wants it to go on.

    `gpu_seconds_limit`: raise the budget of GPU hours to this; None: it stays.
    """
    raised = {} if gpu_seconds_limit is None else {"gpu_seconds_limit": gpu_seconds_limit}
    changed = await rows_changed(
        session,
        update(Job)
        .where(Job.id == job_id, Job.project_id == project_id, Job.status == JobStatus.PAUSED)
        .values(status=JobStatus.QUEUED, crashes=0, activity=None, activity_at=None, **raised),
    )
    return changed == 1


async def event_seq(session: AsyncSession, job_id: str, event_id: str) -> int | None:
    return await session.scalar(select(Event.seq).where(Event.job_id == job_id, Event.id == event_id))


async def list_events(
    session: AsyncSession, job_id: str, *, after: int | None, limit: int, ascending: bool
) -> Sequence[Event]:
    """Newest first unless `ascending`; `after` is a seq; up to `limit + 1`."""
    query = select(Event).where(Event.job_id == job_id)
    if after is not None:
        query = query.where(Event.seq > after if ascending else Event.seq < after)
    query = query.order_by(Event.seq if ascending else Event.seq.desc()).limit(limit + 1)
    return (await session.scalars(query)).all()
