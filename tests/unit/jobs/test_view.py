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


def shown(status: JobStatus, live: dict[str, Any] | None) -> dict[str, Any]:
    job = Job(
        id="ftjob-1",
        status=status,
        model="tiny",
        training_file="file-1",
        result_files=[],
        seed=1,
        method={"type": "reinforcement", "reinforcement": {"grader": {}, "hyperparameters": {}}},
        options={},
        created_at=1.0,
        trained_tokens=0,
        attempt=1,
        step=3,
        seconds={},
        live=live,
    )
    return job_object(job, {}, organization_id="org", at=2.0).hone.model_dump()


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
