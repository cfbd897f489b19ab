"""kill -9 on any process in mid-job: it goes on from its last snapshot, succeeds, and the ledger sums up."""

from __future__ import annotations

import os
import signal
from collections import Counter
from typing import Any

import pytest

from tests.e2e.service import Service

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

WHO = {
    "supervisor": "workers.supervisor",
    "trainer": "workers.trainer",
    "sampler": "workers.sampler.builtin",
    "keeper": "workers.sampler.keeper",
    "runner": "workers.local",
}


@pytest.mark.parametrize("who", WHO)
def test_a_killed_process_costs_at_most_a_step(service: Service, who: str) -> None:
    job = service.create_job("tiny-llama", steps=6)
    service.wait_until(job.id, lambda job: job.hone["step"] >= 2)
    victims = service.processes(WHO[who])
    assert victims, f"no {who} is running"
    os.kill(victims[-1], signal.SIGKILL)

    ended = service.wait(job.id)

    assert ended.status == "succeeded", ended.to_json(warnings=False)
    rows = service.rollouts(job.id)
    states = Counter(row["state"] for row in rows)
    assert "started" not in states
    assert sum(states.values()) == ended.hone["rollouts"]["started"]
    _steps_are_trained_once(rows, service, job.id)
    if who in ("supervisor", "trainer", "runner"):
        assert ended.hone["attempt"] == 2
        assert any("resumed from step" in event.message for event in service.events(job.id))
    service.wait_gone("workers.trainer")  # an orphan would hold the hardware


def _steps_are_trained_once(rows: list[dict[str, Any]], service: Service, job_id: str) -> None:
    """Per step, the rollouts that count as trained come from one attempt only."""
    attempts: dict[int, set[int]] = {}
    for row in rows:
        if row["state"] == "trained":
            attempts.setdefault(row["step"], set()).add(row["attempt"])
    assert attempts, "nothing was trained"
    assert all(len(found) == 1 for found in attempts.values()), attempts
    checkpoints = [c.step_number for c in service.client.fine_tuning.jobs.checkpoints.list(job_id)]
    assert checkpoints == [6, 4, 2]


def test_a_worker_killed_after_the_last_step_still_ends_the_job(service: Service) -> None:
    job = service.create_job("tiny-llama", steps=3)
    service.wait_until(job.id, lambda job: job.hone["step"] == 3)
    os.kill(service.processes(WHO["supervisor"])[-1], signal.SIGKILL)

    ended = service.wait(job.id)

    assert ended.status == "succeeded", ended.to_json(warnings=False)
    assert [c.step_number for c in service.client.fine_tuning.jobs.checkpoints.list(job.id)] == [3, 2]
    states = Counter(row["state"] for row in service.rollouts(job.id))
    assert sum(states.values()) == ended.hone["rollouts"]["started"]
    assert "started" not in states
