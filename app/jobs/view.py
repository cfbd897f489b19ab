"""A job and its events as a client sees them: OpenAI's objects plus `hone` (contract §2.4, §8.1).

Does not cover: reading them (`repository`). Pure: the same row gives the same answer at the same `at`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.core.states import JobStatus
from app.db.tables import Event, Job
from app.jobs.headers import mask_headers
from app.jobs.plan import Plan

_BEFORE_RUN = frozenset({JobStatus.VALIDATING, JobStatus.QUEUED})


def job_object(job: Job, counts: Mapping[str, int], *, organization_id: str, at: float) -> dict[str, Any]:
    """`fine_tuning.job`. `counts`: its rollouts by state; `at`: the database's time."""
    ended = job.finished_at is not None
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "finished_at": int(job.finished_at) if job.finished_at is not None else None,
        "estimated_finish": _estimate(job, at),
        "status": job.status,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": organization_id,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": list(job.result_files),
        "trained_tokens": job.trained_tokens if ended else None,
        "seed": job.seed,
        "hyperparameters": {},
        "method": _method(job),
        "error": job.error,
        "integrations": job.integrations,
        "metadata": job.user_metadata,
        "user_provided_suffix": job.suffix,
        "hone": _hone(job, counts, at),
    }


def event_object(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data,
    }


def _method(job: Job) -> dict[str, Any]:
    """Canonical, headers masked; `auto` as asked until the job has run, numbers from then on."""
    method = mask_headers(job.method)
    if job.plan is not None and job.started_at is not None and job.status not in _BEFORE_RUN:
        reinforcement = method["reinforcement"]
        numbers = Plan.from_dict(job.plan).hyperparameters(reinforcement["hyperparameters"])
        method = {**method, "reinforcement": {**reinforcement, "hyperparameters": numbers}}
    return method


def _estimate(job: Job, at: float) -> int | None:
    """From the mean time of the steps so far; None before the first step and outside `running`."""
    if job.status != JobStatus.RUNNING or job.started_at is None or not job.total_steps or job.step < 1:
        return None
    per_step = (at - job.started_at) / job.step
    return int(at + per_step * max(job.total_steps - job.step, 0))


def _hone(job: Job, counts: Mapping[str, int], at: float) -> dict[str, Any]:
    age = None if job.activity_at is None else round(max(at - job.activity_at, 0.0), 1)
    here = f"/v1/fine_tuning/jobs/{job.id}"
    return {
        "attempt": job.attempt,
        "activity": None if job.activity is None else {"text": job.activity, "age_s": age},
        "step": job.step,
        "total_steps": job.total_steps,
        "rollouts": {"started": sum(counts.values()), "states": dict(counts)},
        "plan": job.plan,
        "options": job.options,
        "seconds": job.seconds,
        "queue_reason": job.queue_reason,
        "links": {"events": f"{here}/events", "rollouts": f"{here}/rollouts", "checkpoints": f"{here}/checkpoints"},
    }
