"""Following a job: events once and in order, one point per step, and a job that fails is said so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

from examples.shop import train
from examples.shop.agent import Shop
from examples.shop.data import shop_task
from examples.shop.view import Frame


def event(number: int, data: dict[str, Any] | None = None) -> FineTuningJobEvent:
    return FineTuningJobEvent.construct(
        id=f"ftevent-{number}",
        message=f"event {number}",
        level="info",
        type="message" if data is None else "metrics",
        data=data,
    )


def job(status: str, **hone: Any) -> FineTuningJob:
    return FineTuningJob.construct(id="ftjob-1", status=status, error=None, fine_tuned_model=None, hone=hone)


class ScriptedJobs:
    """`fine_tuning.jobs` of a service that answers with the next look each time."""

    def __init__(self, *looks: tuple[FineTuningJob, list[FineTuningJobEvent]]) -> None:
        self._looks = list(looks)
        self._events: list[FineTuningJobEvent] = []
        self.created: dict[str, Any] = {}

    def retrieve(self, job_id: str) -> FineTuningJob:
        found, self._events = self._looks.pop(0)
        return found

    def list_events(self, job_id: str, limit: int) -> list[FineTuningJobEvent]:
        return self._events[::-1]

    def create(self, **request: Any) -> FineTuningJob:
        self.created = request
        return job("validating_files")


def client_of(jobs: ScriptedJobs) -> OpenAI:
    files = SimpleNamespace(create=lambda **upload: SimpleNamespace(id=f"file-{upload['file'][0]}"))
    return cast(OpenAI, SimpleNamespace(fine_tuning=SimpleNamespace(jobs=jobs), files=files))


class Recorded:
    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def show(self, frame: Frame) -> None:
        self.frames.append(frame)

    def count(self, label: str, done: int, total: int) -> None: ...


def test_every_event_is_shown_once_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "POLL_S", 0.0)
    events = [event(number) for number in range(4)]
    looks = [(job("queued"), events[:1]), (job("running"), events[:3]), (job("failed"), events)]
    view = Recorded()
    ended, seen = train.follow(client_of(ScriptedJobs(*looks)), "ftjob-1", view, 60)
    assert ended.status == "failed"
    assert [shown for frame in view.frames for shown in frame.events] == [f"event {n}" for n in range(4)]
    assert seen == events


def test_a_job_that_never_ends_is_given_up() -> None:
    jobs = ScriptedJobs((job("running"), []))
    with pytest.raises(TimeoutError, match="ftjob-1 is still running"):
        train.follow(client_of(jobs), "ftjob-1", Recorded(), 0)


def test_a_step_that_was_also_evaluated_is_one_point() -> None:
    step = {"step": 4, "train_mean_reward": 0.6, "tool_calls_mean": 1.0}
    valid = {"sampled": {"reward_mean": 0.7}, "greedy": None}
    seen = [event(1, {"step": 0, "valid": valid}), event(2, step), event(3, {**step, "valid": valid})]
    frame = train.frame(job("running", step=4, total_steps=8), seen, [], 1.0)
    assert frame.rewards == [0.6]
    assert frame.valid_rewards == [0.7, 0.7]
    assert (frame.step, frame.total_steps) == (4, 8)


def test_a_queued_job_shows_why_it_waits() -> None:
    assert train.frame(job("queued", queue_reason="waits for slots", activity=None), [], [], 1.0).activity == (
        "waits for slots"
    )


def test_the_job_is_eight_steps_of_eight_rows_with_the_users_endpoints() -> None:
    jobs = ScriptedJobs()
    train.create_job(client_of(jobs), Shop("http://shop", "secret"), shop_task(1), "model", 7)
    asked = jobs.created["method"]["reinforcement"]
    assert asked["tools"] == [
        {
            "name": "lookup",
            "server_url": "http://shop/tools/lookup",
            "headers": {"Authorization": "Bearer secret"},
        }
    ]
    assert asked["grader"]["url"] == "http://shop/grade"
    assert asked["max_episode_steps"] == 3
    assert len(shop_task(1).train) * asked["hyperparameters"]["n_epochs"] / asked["hyperparameters"]["batch_size"] == 8
    assert jobs.created["seed"] == 7
    assert jobs.created["extra_body"]["hone"]["max_tokens_per_turn"] == 48
