"""kill -9 on any process in mid-job: it goes on from its last snapshot, succeeds, and the ledger sums up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import httpx
import pytest
from openai import APIConnectionError, OpenAI

from deploy.local.ports import free_port
from tests.e2e.service import START_S, Service

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


# An API whose doorbell ends it: what it committed is all that is left of the request.
DIES_AT_THE_BELL = """
import os, signal, sys
from app.cli.main import main
from app.jobs.doorbell import Silent
Silent.ring = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.argv = ["hone", "api", "--port", sys.argv[1]]
main()
"""


def test_an_api_killed_between_commit_and_doorbell_costs_no_job(service: Service) -> None:
    port, proper = free_port(), service.client
    before = {job.id for job in proper.fine_tuning.jobs.list()}
    with subprocess.Popen([sys.executable, "-c", DIES_AT_THE_BELL, str(port)], env=service.environment) as doomed:
        try:
            service.client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=service.key, max_retries=0)
            _until_up(port)
            with pytest.raises(APIConnectionError):
                service.create_job("tiny-llama")
            assert doomed.wait(20) == -signal.SIGKILL
        finally:
            service.client = proper
            doomed.kill()

    (job_id,) = {job.id for job in proper.fine_tuning.jobs.list()} - before
    assert service.wait(job_id).status == "succeeded"


def _until_up(port: int) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200:
                return
        except httpx.TransportError:
            assert time.monotonic() < deadline, "the second API did not come up"
        time.sleep(0.1)
