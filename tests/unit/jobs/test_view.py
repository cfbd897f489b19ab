"""What a running job shows under `hone`, and what remains of it when nobody keeps it up to date."""

from __future__ import annotations

from typing import Any

import pytest

from app.core.states import JobStatus
from app.db.tables import Job
from app.jobs.view import job_object

SHARES = {"sampling": 0.3, "tool_wait": 0.6, "idle": 0.1}
LIVE = {
    "diagnosis": {"bound": "tool", "sentence": "tool-bound: …", "shares": SHARES, "rollouts_idle": 0.0, "seconds": {}},
    "overlap": {"max_staleness": 1, "version": 4, "in_flight": 30, "limit": 64, "waiting_for": None},
    "congestion": {"limit": 64},
    "publication": {"seconds": {"load": 0.2}},
}


def job(**values: Any) -> Job:
    common = {
        "id": "ftjob-1",
        "status": JobStatus.RUNNING,
        "model": "tiny",
        "training_file": "file-1",
        "result_files": [],
        "seed": 1,
        "method": {"type": "reinforcement", "reinforcement": {"grader": {}, "hyperparameters": {}}},
        "options": {},
        "created_at": 1.0,
        "trained_tokens": 0,
        "attempt": 1,
        "step": 3,
        "seconds": {},
        "gpus": 1,
        "gpu_seconds": 0.0,
    }
    return Job(**{**common, **values})


def shown(status: JobStatus, live: dict[str, Any] | None) -> dict[str, Any]:
    return job_object(job(status=status, live=live), {}, organization_id="org", at=2.0).hone.model_dump()


def estimate(at: float, **values: Any) -> int | None:
    return job_object(job(**values), {}, organization_id="org", at=at).estimated_finish


def test_a_running_job_shows_where_its_time_goes_and_what_it_waits_for() -> None:
    hone = shown(JobStatus.RUNNING, LIVE)
    assert (hone["diagnosis"]["bound"], hone["diagnosis"]["shares"]) == ("tool", SHARES)
    assert "seconds" not in hone["diagnosis"]
    assert (hone["overlap"], hone["congestion"]) == (LIVE["overlap"], LIVE["congestion"])


@pytest.mark.parametrize("status", [JobStatus.PAUSED, JobStatus.QUEUED, JobStatus.SUCCEEDED, JobStatus.CANCELLED])
def test_figures_of_the_moment_go_with_the_worker_and_the_diagnosis_stays(status: JobStatus) -> None:
    hone = shown(status, LIVE)
    assert (hone["overlap"], hone["congestion"]) == (None, None)
    assert hone["diagnosis"]["bound"] == "tool"
    assert hone["publication"] == LIVE["publication"]


def test_a_job_that_never_ran_has_none_of_it() -> None:
    hone = shown(JobStatus.VALIDATING, None)
    assert [hone[name] for name in ("diagnosis", "overlap", "congestion", "publication")] == [None] * 4


SPENT = {"startup": 300.0, "sampling": 40.0, "training": 20.0}  # 20 s a step


def test_the_end_is_estimated_from_the_time_spent_on_steps_and_not_from_waits_and_pauses() -> None:
    at_once = estimate(1000.0, total_steps=5, seconds=SPENT)
    assert at_once == 1040
    assert estimate(90_000.0, total_steps=5, seconds=SPENT, started_at=1.0) == 90_040  # paused for a day in between


@pytest.mark.parametrize("values", [{"step": 0}, {"total_steps": None}, {"status": JobStatus.PAUSED}])
def test_no_end_is_estimated_before_the_first_step_or_while_nothing_runs(values: dict[str, Any]) -> None:
    assert estimate(1000.0, **{"total_steps": 5, "seconds": SPENT, **values}) is None


def test_gpu_hours_of_a_running_job_grow_until_its_lease_ends() -> None:
    running = job(
        options={"max_gpu_hours": 2}, gpu_seconds=1800.0, gpus=4, running_since=10_000.0, lease_until=10_900.0
    )
    for at, spent in ((10_450.0, 1.0), (10_900.0, 1.5), (99_999.0, 1.5)):
        hone = job_object(running, {}, organization_id="org", at=at).hone
        assert hone.gpu_hours.model_dump() == {"spent": spent, "limit": 2.0}
