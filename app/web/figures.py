"""What the rows tell about the whole service, for `GET /metrics`: workers have no port, and write everything there.

Does not cover: a single project, job or user; those have the API.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.states import TERMINAL, JobStatus, RolloutState
from app.db.engine import now
from app.db.tables import Event, Job, Rollout, Sampler, SamplerWant, Worker
from app.samplers.repository import LIVE_WITHIN_S

SILENT_AFTER_S = 30.0  # six beats of a runner or keeper


@dataclass(frozen=True)
class Figures:
    """`rollouts` and `phase_seconds` are of jobs that have not ended: counting all rows ever would grow for ever."""

    jobs: Mapping[str, int]  # by status, every status
    rollouts: Mapping[str, int]  # by state, every state
    phase_seconds: Mapping[str, float]
    queue_age_s: float  # of the job that waits longest for a worker; 0: none waits
    expired_leases: int  # jobs whose worker is silent and that nobody has taken up yet
    samplers: Mapping[str, int]  # alive, by base model
    samplers_wanted: int  # base models that somebody waits for
    processes: Mapping[str, int]  # alive, by kind


async def read(session: AsyncSession) -> Figures:
    """A handful of queries over indices; bounded by the jobs that have not ended."""
    open_jobs = Job.status.not_in([status.value for status in TERMINAL])
    jobs = await _counts(session, select(Job.status, func.count()).group_by(Job.status))
    rollouts = await _counts(
        session,
        select(Rollout.state, func.count())
        .join(Job, Job.id == Rollout.job_id)
        .where(open_jobs)
        .group_by(Rollout.state),
    )
    phases: Counter[str] = Counter()
    for seconds in await session.scalars(select(Job.seconds).where(open_jobs)):
        phases.update(seconds)
    samplers = select(Sampler.base_model, func.count()).where(Sampler.heartbeat > now() - LIVE_WITHIN_S)
    processes = select(Worker.kind, func.count()).where(Worker.heartbeat > now() - SILENT_AFTER_S)
    expired = select(func.count()).where(Job.status == JobStatus.RUNNING, Job.lease_until < now())
    wanted = select(func.count()).select_from(SamplerWant).where(SamplerWant.wanted_until > now())
    return Figures(
        jobs={status.value: jobs.get(status.value, 0) for status in JobStatus},
        rollouts={state.value: rollouts.get(state.value, 0) for state in RolloutState},
        phase_seconds=phases,
        queue_age_s=await _queue_age(session),
        expired_leases=await session.scalar(expired) or 0,
        samplers=await _counts(session, samplers.group_by(Sampler.base_model)),
        samplers_wanted=await session.scalar(wanted) or 0,
        processes=await _counts(session, processes.group_by(Worker.kind)),
    )


async def _counts(session: AsyncSession, query: Select[str, int]) -> dict[str, int]:
    return {name: number for name, number in await session.execute(query)}


async def _queue_age(session: AsyncSession) -> float:
    """A job waits since its latest event: it was created, validated, or put back by a worker."""
    latest = (
        select(Event.created_at).where(Event.job_id == Job.id).order_by(Event.seq.desc()).limit(1).scalar_subquery()
    )
    since = func.min(func.coalesce(latest, Job.created_at))
    age = await session.scalar(select(now() - since).where(Job.status == JobStatus.QUEUED))
    return max(0.0, age or 0.0)
