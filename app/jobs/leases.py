"""The only writes a worker makes to a job: claim, renew, fenced updates, release, pause, finish.

Does not cover: the client's transitions (`app.jobs.service`) and taking back leases of the dead (`app.jobs.reconcile`).

A worker owns a job by winning one conditional UPDATE that raises `attempt`; every later write carries
`WHERE id AND attempt AND status='running'`, so a worker that lost its lease can write nothing (design §4.1–2).
Leases are measured by the database's clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, and_, case, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.states import JobStatus, RolloutState
from app.db.engine import alone, now, rows_changed
from app.db.tables import Job, Rollout, Snapshot
from app.jobs import events, meter, state
from app.webhooks import outbox


class LeaseLost(Exception):
    """Another attempt owns the job, or a client cancelled it: stop at once and write nothing."""


@dataclass(frozen=True)
class Fence:
    """What every write of a worker carries."""

    job_id: str
    attempt: int
    project_id: str


@dataclass(frozen=True)
class Waiting:
    """A queued job, and what decides which workers it is for."""

    id: str
    model: str


@dataclass(frozen=True)
class Claim:
    """A won claim: the job as it stood, the fence, and the snapshot to resume from (None = from the start)."""

    job: Job
    fence: Fence
    snapshot: Snapshot | None


async def waiting(session: AsyncSession, limit: int = 1000) -> Sequence[Waiting]:
    """Jobs that wait for a worker, oldest first."""
    query = select(Job.id, Job.model).where(Job.status == JobStatus.QUEUED).order_by(Job.created_at).limit(limit)
    return [Waiting(job_id, model) for job_id, model in await session.execute(query)]


async def claim(session: AsyncSession, job_id: str, *, owner: str, lease_s: float, adapter_slots: int) -> Claim | None:
    """Try to own `job_id`. None if it is not queued, someone was faster, or its sampler has no free adapter slots.

    `adapter_slots`: what one sampler holds, see `shortage`.
    The same transaction closes what the dead left open: rollouts without an end become `lost`, those finished above the
    snapshot become `rolled_back`.
    """
    job = await session.scalar(
        select(Job).where(Job.id == job_id, Job.status == JobStatus.QUEUED).with_for_update(skip_locked=True)
    )
    if job is None:
        return None
    await alone(session, f"adapter slots of {job.model}")
    short = await shortage(session, job, adapter_slots)
    if short is not None:
        job.queue_reason = short
        return None
    state.check(JobStatus(job.status), JobStatus.RUNNING, state.Actor.WORKER)
    attempt = job.attempt + 1
    won = await rows_changed(
        session,
        update(Job)
        .where(Job.id == job_id, Job.status == JobStatus.QUEUED, Job.attempt == job.attempt)
        .values(
            status=JobStatus.RUNNING,
            attempt=attempt,
            lease_owner=owner,
            lease_until=now() + lease_s,
            started_at=func.coalesce(Job.started_at, now()),
            reserved_slots=_slots(job),
            queue_reason=None,
            activity="starting",
            activity_at=now(),
            **meter.begins(),
        ),
    )
    if won != 1:
        return None
    snapshot = await session.scalar(
        select(Snapshot)
        .where(Snapshot.job_id == job_id)
        .order_by(Snapshot.step.desc(), Snapshot.attempt.desc())
        .limit(1)
    )
    await _close_rollouts(session, job_id, snapshot.step if snapshot else 0)
    await session.refresh(job)
    fence = Fence(job_id, attempt, job.project_id)
    message = "Fine-tuning job started" if attempt == 1 else f"Fine-tuning job resumed from step {job.step}"
    await events.append(session, project_id=job.project_id, job_id=job_id, message=message, data={"attempt": attempt})
    return Claim(job, fence, snapshot)


async def shortage(session: AsyncSession, job: Job, adapter_slots: int) -> str | None:
    """Why its sampler has no adapter slots for this job now; None: it has.

    Of the `adapter_slots` that a sampler holds chat keeps one (design §6.2).
    """
    query = select(func.coalesce(func.sum(Job.reserved_slots), 0)).where(
        Job.status == JobStatus.RUNNING, Job.model == job.model
    )
    wanted, free = _slots(job), adapter_slots - 1 - (await session.scalar(query) or 0)
    return f"waits for adapter slots: {wanted} needed, {free} of {adapter_slots - 1} free" if wanted > free else None


def _slots(job: Job) -> int:
    """One for each version that may be sampled from, one for the version that is being published."""
    return int((job.plan or {}).get("max_staleness", 0)) + 2


async def note_queue_reason(session: AsyncSession, job_id: str, reason: str) -> None:
    """Why a queued job waits, said by a door: what a refused claim would have written, or a start that failed."""
    await rows_changed(
        session, update(Job).where(Job.id == job_id, Job.status == JobStatus.QUEUED).values(queue_reason=reason)
    )


async def note_failed_start(session: AsyncSession, job_id: str, *, reason: str, first: bool) -> None:
    """A worker's process ended before its claim; of several in a row only the `first` becomes an event."""
    await note_queue_reason(session, job_id, reason)
    job = await session.get(Job, job_id)
    if first and job is not None and job.status == JobStatus.QUEUED:
        await events.append(
            session,
            project_id=job.project_id,
            job_id=job_id,
            level="warn",
            message=f"The job waits: {reason}. It is tried again at growing intervals",
        )


async def _close_rollouts(session: AsyncSession, job_id: str, resume_step: int) -> None:
    """`lost`: open when the worker died. `rolled_back`: finished for a step above `resume_step` (design §4.3)."""
    open_ = Rollout.state == RolloutState.STARTED
    undone = and_(
        Rollout.step > resume_step,
        Rollout.state.in_(
            [
                RolloutState.TRAINED,
                RolloutState.EVALUATED,
                RolloutState.NO_SIGNAL,
                RolloutState.NOT_SELECTED,
                RolloutState.GROUP_DROPPED,
            ]
        ),
    )
    await session.execute(
        update(Rollout)
        .where(Rollout.job_id == job_id, or_(open_, undone))
        .values(
            state=case(
                (and_(open_, Rollout.finished_at.is_(None)), RolloutState.LOST.value),
                else_=RolloutState.ROLLED_BACK.value,
            ),
            finished_at=func.coalesce(Rollout.finished_at, now()),
        )
        .execution_options(synchronize_session=False)
    )


def renew(engine: Engine, fence: Fence, lease_s: float) -> bool:
    """Synchronous, for the heartbeat thread. False: the lease is lost."""
    with engine.begin() as connection:
        result = connection.execute(
            update(Job.__table__)  # type: ignore[arg-type]  # a Table, declared as FromClause
            .where(Job.id == fence.job_id, Job.attempt == fence.attempt, Job.status == JobStatus.RUNNING)
            .values(lease_until=now() + lease_s)
        )
        return result.rowcount == 1


async def fenced(session: AsyncSession, fence: Fence, **values: Any) -> None:
    """Update the job's row if the lease is still ours. Raises `LeaseLost`.

    Call it first in each worker transaction: it takes the row's lock, so that what follows is fenced too.
    """
    result = await rows_changed(
        session,
        update(Job)
        .where(Job.id == fence.job_id, Job.attempt == fence.attempt, Job.status == JobStatus.RUNNING)
        .values(**(values or {"attempt": fence.attempt})),
    )
    if result != 1:
        raise LeaseLost(fence.job_id)


def owner_name(host: str, pid: int) -> str:
    """How a supervisor's process signs its lease."""
    return f"{host}:{pid}"


async def expire(session: AsyncSession, job_id: str, owner: str) -> None:
    """End the lease of a supervisor that is known to be dead, so that nobody waits for it to run out."""
    await session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status == JobStatus.RUNNING, Job.lease_owner == owner)
        .values(lease_until=meter.held_until())
        .execution_options(synchronize_session=False)
    )


def given_up() -> dict[str, Any]:
    """What every end of a run writes: the worker, and what it held, are off the row."""
    return {
        "lease_owner": None,
        "lease_until": None,
        "reserved_slots": 0,
        "activity": None,
        "activity_at": None,
        **meter.ends(),
    }


async def crash_count(session: AsyncSession, fence: Fence) -> int:
    """Crashes since the last finished step."""
    return await session.scalar(select(Job.crashes).where(Job.id == fence.job_id)) or 0


async def release(session: AsyncSession, fence: Fence, *, reason: str, crashes: int | None = None) -> None:
    """running → queued: another worker goes on from the last snapshot. `crashes` sets the crash count."""
    state.check(JobStatus.RUNNING, JobStatus.QUEUED, state.Actor.WORKER)
    values: dict[str, Any] = {} if crashes is None else {"crashes": crashes}
    await fenced(session, fence, status=JobStatus.QUEUED, **given_up(), **values)
    level: events.Level = "info" if crashes is None else "warn"
    await events.append(
        session,
        project_id=fence.project_id,
        job_id=fence.job_id,
        level=level,
        message=f"{reason}; the job is queued again",
    )


async def pause(
    session: AsyncSession,
    fence: Fence,
    *,
    reason: str,
    data: Mapping[str, Any] | None = None,
    level: events.Level = "error",
) -> None:
    """running → paused: nothing would get better by trying again, so a person looks first and resumes.

    Everything up to the last snapshot is kept; rollouts still open become `cancelled`. `reason` is a sentence for the
    event and for `hone.activity`, `data` its numbers. Raises `LeaseLost`.
    """
    state.check(JobStatus.RUNNING, JobStatus.PAUSED, state.Actor.WORKER)
    shown = {"activity": f"paused: {reason}", "activity_at": now()}
    await fenced(session, fence, status=JobStatus.PAUSED, **{**given_up(), **shown})
    await close_open_rollouts(session, fence.job_id)
    step = await session.scalar(select(Job.step).where(Job.id == fence.job_id))
    await events.append(
        session,
        project_id=fence.project_id,
        job_id=fence.job_id,
        level=level,
        message=f"Fine-tuning job paused after step {step}: {reason}",
        data={"step": step, **(data or {})},
    )
    await outbox.enqueue(session, fence.job_id, JobStatus.PAUSED)


async def finish(session: AsyncSession, fence: Fence, status: JobStatus, **values: Any) -> None:
    """running → succeeded | failed, with whatever else belongs on the row (error, fine_tuned_model, …)."""
    state.check(JobStatus.RUNNING, status, state.Actor.WORKER)
    await fenced(session, fence, status=status, finished_at=now(), **given_up(), **values)
    await close_open_rollouts(session, fence.job_id)
    await outbox.enqueue(session, fence.job_id, status)


async def close_open_rollouts(session: AsyncSession, job_id: str) -> None:
    """Rollouts still open when a job stops (failed, cancelled, paused) become `cancelled`."""
    await session.execute(
        update(Rollout)
        .where(Rollout.job_id == job_id, Rollout.state == RolloutState.STARTED)
        .values(state=RolloutState.CANCELLED, finished_at=func.coalesce(Rollout.finished_at, now()))
        .execution_options(synchronize_session=False)
    )


async def unvalidated(session: AsyncSession, limit: int = 20) -> Sequence[str]:
    """Ids of jobs whose files nobody is reading right now."""
    query = (
        select(Job.id)
        .where(Job.status == JobStatus.VALIDATING, or_(Job.lease_until.is_(None), Job.lease_until < now()))
        .order_by(Job.created_at)
        .limit(limit)
    )
    return (await session.scalars(query)).all()


async def claim_validation(session: AsyncSession, job_id: str, owner: str, lease_s: float = 300.0) -> Job | None:
    """Own the reading of the job's files; the result is the same whoever reads, so no attempt is counted."""
    result = await rows_changed(
        session,
        update(Job)
        .where(
            Job.id == job_id,
            Job.status == JobStatus.VALIDATING,
            or_(Job.lease_until.is_(None), Job.lease_until < now()),
        )
        .values(lease_owner=owner, lease_until=now() + lease_s),
    )
    return await session.get(Job, job_id) if result == 1 else None


async def finish_validation(
    session: AsyncSession,
    job_id: str,
    owner: str,
    *,
    plan: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
) -> bool:
    """validating_files → queued (with the plan) or failed (with the error). False: cancelled meanwhile, or not ours."""
    target = JobStatus.QUEUED if error is None else JobStatus.FAILED
    state.check(JobStatus.VALIDATING, target, state.Actor.VALIDATOR)
    total = plan["total_steps"] if plan else None
    result = await rows_changed(
        session,
        update(Job)
        .where(Job.id == job_id, Job.status == JobStatus.VALIDATING, Job.lease_owner == owner)
        .values(
            status=target,
            plan=plan,
            total_steps=total,
            error=error,
            lease_owner=None,
            lease_until=None,
            finished_at=None if error is None else now(),
        ),
    )
    if result == 1:
        await outbox.enqueue(session, job_id, target)
    return result == 1
