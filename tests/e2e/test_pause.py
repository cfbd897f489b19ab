"""Pause, resume, cancel and SIGTERM on a job that trains: who is gone by when, and that the story has no gap."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from tests.e2e.service import LEASE_S, Service

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

STEPS = 6
GONE_S = LEASE_S / 4 + 1.0  # one heartbeat of the supervisor, as docs/operations.md says


def messages(service: Service, job_id: str) -> list[str]:
    """Without the figures of each step."""
    return [event.message for event in service.events(job_id) if event.type == "message"]


def trained_steps(service: Service, job_id: str) -> list[int]:
    """As the metrics tell them."""
    figures = [event.data for event in service.events(job_id) if event.type == "metrics"]
    return [data["step"] for data in figures if "train_mean_reward" in data and "full_valid_mean_reward" not in data]


def all_ended(service: Service, job: Any) -> bool:
    states = job.hone["rollouts"]["states"]
    return "started" not in states and sum(states.values()) == job.hone["rollouts"]["started"]


def test_a_paused_job_frees_its_trainer_and_a_resume_makes_up_the_same_number_of_steps(service: Service) -> None:
    job = service.create_job("tiny-llama", steps=STEPS)
    service.wait_until(job.id, lambda job: job.hone["step"] >= 2)
    paused = service.client.fine_tuning.jobs.pause(job.id)
    service.wait_gone("workers.trainer", GONE_S)
    service.wait_gone("workers.supervisor", 60.0)
    assert paused.status == "paused"

    time.sleep(1.0)
    still = service.client.fine_tuning.jobs.retrieve(job.id)
    step = paused.hone["step"]
    assert (still.status, still.hone["step"]) == ("paused", step)
    assert still.hone["gpu_hours"] == paused.hone["gpu_hours"]  # a pause costs nothing
    assert all_ended(service, still)

    assert service.client.fine_tuning.jobs.resume(job.id).status == "queued"
    ended = service.wait(job.id)
    assert ended.status == "succeeded", ended.to_json(warnings=False)
    assert (ended.hone["step"], trained_steps(service, job.id)) == (STEPS, list(range(1, STEPS + 1)))
    assert all_ended(service, ended)
    told = messages(service, job.id)
    story = [
        "Fine-tuning job started",
        f"Fine-tuning job paused after step {step} by a client",
        f"Resume requested; the job is queued and goes on from step {step}",
        f"Fine-tuning job resumed from step {step}",
        "The job has successfully completed",
    ]
    assert [message for message in told if message in story] == story
    assert [c.step_number for c in service.client.fine_tuning.jobs.checkpoints.list(job.id)] == [6, 4, 2]


def test_a_cancel_is_answered_at_once_and_the_trainer_is_gone_within_a_heartbeat(service: Service) -> None:
    job = service.create_job("tiny-llama", steps=STEPS)
    service.wait_until(job.id, lambda job: job.hone["step"] >= 1)
    began = time.monotonic()
    cancelled = service.client.fine_tuning.jobs.cancel(job.id)
    assert time.monotonic() - began < 1.0
    service.wait_gone("workers.trainer", GONE_S)
    service.wait_gone("workers.supervisor", 60.0)
    ended = service.client.fine_tuning.jobs.retrieve(job.id)
    assert cancelled.status == ended.status == "cancelled"
    assert all_ended(service, ended)
    assert messages(service, job.id)[-1] == "Fine-tuning job cancelled"


def test_a_supervisor_that_is_asked_to_stop_hands_its_job_back_with_every_finished_step(service: Service) -> None:
    job = service.create_job("tiny-llama", steps=STEPS)
    service.wait_until(job.id, lambda job: job.hone["step"] >= 2)
    os.kill(service.processes("workers.supervisor")[-1], signal.SIGTERM)
    ended = service.wait(job.id)
    assert ended.status == "succeeded", ended.to_json(warnings=False)
    assert (ended.hone["attempt"], trained_steps(service, job.id)) == (2, list(range(1, STEPS + 1)))
    (back,) = [event for event in service.events(job.id) if "queued again" in event.message]
    assert (back.level, back.message) == ("info", "The worker was asked to stop; the job is queued again")  # no crash
