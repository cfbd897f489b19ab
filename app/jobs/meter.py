"""GPU hours of a job: the running time of all its attempts × the GPUs each held, by the database's clock; and a budget.

Does not cover: who stops a run whose budget is spent (`workers.budget`). A run is counted when it ends, whoever writes
that; one whose worker died counts until its lease ran out. GPUs of samplers do not count: they belong to no job.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Case, case

from app.db.engine import now
from app.db.tables import Job

HOUR_S = 3600.0


def begins() -> dict[str, Any]:
    """What a claim writes; the run says how many GPUs it holds when it knows."""
    return {"running_since": now(), "gpus": 1}


def held_until() -> Case[Any]:
    """When the lease ends that is taken away now: it may have run out before."""
    return case((Job.lease_until < now(), Job.lease_until), else_=now())


def ends() -> dict[str, Any]:
    """What every end of a run writes; nothing changes for a job that does not run."""
    seconds = held_until() - Job.running_since
    return {
        "gpu_seconds": Job.gpu_seconds + case((seconds > 0, seconds * Job.gpus), else_=0.0),
        "running_since": None,
    }


def spent_s(job: Job, at: float) -> float:
    """GPU seconds up to `at`, the database's time."""
    if job.running_since is None:
        return job.gpu_seconds
    until = at if job.lease_until is None else min(at, job.lease_until)
    return job.gpu_seconds + max(until - job.running_since, 0.0) * job.gpus


def limit_s(job: Job) -> float | None:
    """What `spent_s` may come to; None: whatever it takes."""
    asked = job.options.get("max_gpu_hours")
    if asked is None:
        return None
    return float(asked) * HOUR_S if job.gpu_seconds_limit is None else job.gpu_seconds_limit


def granted_s(job: Job) -> float | None:
    """The limit after a resume: as much again for a job whose budget is spent. None: it stays as it is."""
    limit = limit_s(job)
    if limit is None or job.gpu_seconds < limit:
        return None
    return job.gpu_seconds + float(job.options["max_gpu_hours"]) * HOUR_S
