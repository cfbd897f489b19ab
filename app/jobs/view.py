"""A row of a job or an event → what a client sees.

Does not cover: reading rows (`repository`). Pure: the same row gives the same answer at the same `at`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.core.states import JobStatus
from app.db.tables import Event, Job
from app.jobs import meter
from app.jobs.headers import mask_headers
from app.jobs.plan import Plan
from app.jobs.wire import Activity, FineTuningJob, GpuHours, Hone, JobEvent, Links, RolloutCounts

_BEFORE_RUN = frozenset({JobStatus.VALIDATING, JobStatus.QUEUED})
_ONCE = "startup"  # of an attempt; every other phase belongs to the steps
_LASTING = ("diagnosis", "publication")  # true of the job when it has stopped, too
_PRESENT = ("overlap", "congestion")  # true only while somebody keeps them up to date


def job_object(job: Job, counts: Mapping[str, int], *, organization_id: str, at: float) -> FineTuningJob:
    """`counts`: its rollouts by state; `at`: the database's time."""
    return FineTuningJob.model_validate(
        {
            "id": job.id,
            "created_at": int(job.created_at),
            "finished_at": None if job.finished_at is None else int(job.finished_at),
            "estimated_finish": _estimate(job, at),
            "status": job.status,
            "model": job.model,
            "fine_tuned_model": job.fine_tuned_model,
            "organization_id": organization_id,
            "training_file": job.training_file,
            "validation_file": job.validation_file,
            "result_files": job.result_files,
            "trained_tokens": None if job.finished_at is None else job.trained_tokens,
            "seed": job.seed,
            "hyperparameters": {},
            "method": _method(job),
            "error": job.error,
            "integrations": job.integrations,
            "metadata": job.user_metadata,
            "user_provided_suffix": job.suffix,
            "hone": _hone(job, counts, at),
        }
    )


def event_object(event: Event) -> JobEvent:
    return JobEvent.model_validate(
        {
            "id": event.id,
            "created_at": int(event.created_at),
            "level": event.level,
            "message": event.message,
            "type": event.type,
            "data": event.data,
        }
    )


def _method(job: Job) -> dict[str, Any]:
    """Canonical, headers masked; `auto` as asked until the job has run, numbers from then on."""
    method = mask_headers(job.method)
    if job.plan is None or job.started_at is None or job.status in _BEFORE_RUN:
        return method
    reinforcement = method["reinforcement"]
    numbers = Plan.from_dict(job.plan).hyperparameters(reinforcement["hyperparameters"])
    return {**method, "reinforcement": {**reinforcement, "hyperparameters": numbers}}


def _estimate(job: Job, at: float) -> int | None:
    """From the time that was spent on the steps so far, so that no wait in the queue or in a pause counts.

    None before the first step and outside `running`.
    """
    if job.status != JobStatus.RUNNING or not job.total_steps or job.step < 1:
        return None
    spent = sum(float(seconds) for phase, seconds in job.seconds.items() if phase != _ONCE)
    return int(at + spent / job.step * max(job.total_steps - job.step, 0))


def _gpu_hours(job: Job, at: float) -> GpuHours:
    spent, limit = meter.spent_s(job, at), meter.limit_s(job)
    return GpuHours(
        spent=round(spent / meter.HOUR_S, 6), limit=None if limit is None else round(limit / meter.HOUR_S, 6)
    )


def _hone(job: Job, counts: Mapping[str, int], at: float) -> Hone:
    age = None if job.activity_at is None else round(max(at - job.activity_at, 0.0), 1)
    here = f"/v1/fine_tuning/jobs/{job.id}"
    live = job.live or {}
    shown = _LASTING + _PRESENT if job.status == JobStatus.RUNNING else _LASTING
    return Hone(
        attempt=job.attempt,
        activity=None if job.activity is None else Activity(text=job.activity, age_s=age),
        step=job.step,
        total_steps=job.total_steps,
        rollouts=RolloutCounts(started=sum(counts.values()), states=dict(counts)),
        plan=job.plan,
        options=job.options,
        seconds=job.seconds,
        gpu_hours=_gpu_hours(job, at),
        queue_reason=job.queue_reason,
        links=Links(events=f"{here}/events", rollouts=f"{here}/rollouts", checkpoints=f"{here}/checkpoints"),
        **{name: live[name] for name in shown if name in live},
    )
