"""One real job, end to end: upload, create, poll, chat; real processes, real HTTP, a model that can call a tool."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from typing import Any

import pytest

from tests.e2e.agent_server import TOKEN
from tests.e2e.service import Service
from tests.e2e.teach import LOOKUP, question

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


@pytest.fixture(scope="module", params=[("tiny-llama", 1), ("tiny-qwen3", 0)], ids=str)
def job(request: pytest.FixtureRequest, service: Service) -> Any:
    """A finished job of each architecture and tool format; one overlapped, one strictly on-policy."""
    model, staleness = request.param
    created = service.create_job(model, steps=3, hone={"max_staleness": staleness})
    assert created.status == "validating_files"
    return service.wait(created.id)


def test_it_succeeds_with_the_events_that_scripts_match_on(job: Any, service: Service) -> None:
    assert job.status == "succeeded", job.to_json(warnings=False)
    messages = [event.message for event in service.events(job.id)]
    assert messages[0] == f"Created fine-tuning job: {job.id}"
    assert messages[-2:] == [
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed",
    ]
    assert job.trained_tokens > 0
    assert job.error is None
    assert job.hyperparameters.to_dict() == {}


def test_every_rollout_ends_in_one_state_and_the_states_sum_up(job: Any, service: Service) -> None:
    rows = service.rollouts(job.id)
    states = Counter(row["state"] for row in rows)
    assert "started" not in states
    assert states["evaluated"] == 6 * 5  # six rows: sampled and greedy before and after, sampled at step 2
    assert sum(states.values()) == job.hone["rollouts"]["started"]
    assert states["trained"] > 0


def test_tools_and_grader_are_called_with_one_trace_id_and_the_headers(job: Any, service: Service) -> None:
    seen = service.seen()
    assert seen["lookup"] > 0
    assert set(seen["splits"]) == {"train", "valid"}
    called = next(row for row in service.rollouts(job.id) if row["tool_calls"] > 0)
    assert seen["traces"][called["id"]] == ["lookup"] * called["tool_calls"] + ["grade"]


def test_a_trace_holds_what_the_engine_saw(job: Any, service: Service) -> None:
    called = next(row for row in service.rollouts(job.id) if row["tool_calls"] > 0 and row["state"] == "trained")
    shown: Any = service.client.get(f"/fine_tuning/jobs/{job.id}/rollouts/{called['id']}", cast_to=object)
    tokens = shown["trace"]["tokens"]
    assert len(tokens["ids"]) == len(tokens["mask"]) == len(tokens["log_probs"])
    assert sum(tokens["mask"]) == called["completion_tokens"]
    assert all(p < 0 for p, m in zip(tokens["log_probs"], tokens["mask"], strict=True) if m)
    assert [m["role"] for m in shown["trace"]["messages"]][:2] == ["system", "user"]
    assert shown["trace"]["tool_calls"][0]["name"] == "lookup"
    assert shown["trace"]["grade"]["reason"].endswith("calls")


def test_sampler_and_trainer_agree_in_fp32(job: Any, service: Service) -> None:
    policies = [e.data["policy"] for e in service.events(job.id) if e.type == "metrics" and "policy" in e.data]
    staleness = job.hone["plan"]["max_staleness"]
    assert {p["staleness_max"] for p in policies} <= set(range(staleness + 1))
    on_policy = [p for p in policies if p["staleness_max"] == 0]
    assert on_policy
    assert max(p["mismatch_kl"] for p in on_policy) <= 1e-6
    assert max(p["mismatch_max"] for p in on_policy) <= 1e-4


def test_every_version_was_proved_before_it_was_used(job: Any, service: Service) -> None:
    shown = [e.data["publication"] for e in service.events(job.id) if e.type == "metrics" and "publication" in e.data]
    assert {publication["version"] for publication in shown} == {1, 2, 3}
    for publication in shown:
        gates = publication["gates"]
        assert gates["a"]["verdict"] == gates["b"]["verdict"] == "holds", publication
        assert gates["a"]["mean_abs"] <= 1e-4
        assert publication["seconds"]["total"] > 0


def test_the_tuned_model_answers_as_itself_and_a_checkpoint_as_its_own(job: Any, service: Service) -> None:
    checkpoints = list(service.client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [c.step_number for c in checkpoints] == [3, 2]
    assert checkpoints[0].fine_tuned_model_checkpoint == job.fine_tuned_model
    names = [job.model, job.fine_tuned_model, checkpoints[1].fine_tuned_model_checkpoint]
    answers = [_log_probs(service, name) for name in names]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert answers[first] != answers[second], (names[first], names[second])
    assert _log_probs(service, job.fine_tuned_model) == pytest.approx(answers[1], abs=1e-5)


def test_the_result_file_has_a_line_per_step(job: Any, service: Service) -> None:
    text = service.client.files.content(job.result_files[0]).text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert math.isfinite(float(rows[3]["full_valid_mean_reward"]))


def test_no_answer_and_no_log_holds_a_header_value(job: Any, service: Service) -> None:
    secret = TOKEN.removeprefix("Bearer ")
    job_json = service.client.fine_tuning.jobs.retrieve(job.id).to_json(warnings=False)
    assert secret not in job_json
    assert '"Authorization": "***"' in job_json
    for log in (service.data / "logs").glob("*.log"):
        assert secret not in log.read_text(errors="replace"), log
    for file in (service.data / "hone.db", service.data / "hone.db-wal"):
        assert secret.encode() not in file.read_bytes()


def test_the_short_shape_creates_the_same_job(service: Service) -> None:
    long = service.create_job("tiny-llama", steps=3)
    short = service.create_job("tiny-llama", steps=3, short=True)
    try:
        assert short.method.to_dict(warnings=False) == long.method.to_dict(warnings=False)
        assert short.hone["options"] == long.hone["options"]
    finally:
        for created in (long, short):
            assert service.client.fine_tuning.jobs.cancel(created.id).status == "cancelled"


def _log_probs(service: Service, model: str) -> list[float]:
    """Greedy answer's log-probs: what tells two policies apart even when they say the same."""
    answer = service.client.with_options(max_retries=8).chat.completions.create(
        model=model,
        messages=question("lamp"),  # type: ignore[arg-type]
        tools=[LOOKUP],  # type: ignore[list-item]
        temperature=0.0,
        max_tokens=12,
        logprobs=True,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    return [entry.logprob for entry in logprobs.content]
