"""What bad input and broken endpoints get: a job that fails with words one can act on; never a hang, never a 0."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.e2e.agent_server import TOKEN
from tests.e2e.service import Service, row

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_a_tool_that_does_not_answer_is_found_before_the_first_rollout(service: Service) -> None:
    closed = service.closed_port
    job = service.create_job("tiny-llama", tool_url=f"http://127.0.0.1:{closed}/lookup")

    ended = service.wait(job.id)

    assert ended.status == "failed"
    assert ended.error.code == "tool_unreachable"
    assert f"127.0.0.1:{closed}" in ended.error.message
    assert ended.hone["rollouts"]["started"] == 0


def test_a_private_address_that_the_operator_did_not_allow_is_refused_with_the_setting_to_change(
    service: Service,
) -> None:
    job = service.create_job("tiny-llama", tool_url="http://127.0.0.1:9/lookup")

    ended = service.wait(job.id)

    assert ended.status == "failed"
    assert "HONE_EGRESS_ALLOW" in ended.error.message


def test_a_tool_that_fails_stops_the_job_after_a_bounded_number_of_discarded_rollouts(service: Service) -> None:
    job = service.create_job("tiny-llama", tool_url=f"{service.agent_url}/broken")

    ended = service.wait(job.id)

    assert ended.status == "failed"
    assert ended.error.code == "tool_failed"
    for words in ("lookup", "/broken", "503"):
        assert words in ended.error.message
    rows = service.rollouts(job.id)
    states = Counter(r["state"] for r in rows)
    assert 8 <= states["tool_failed"] <= 64
    assert "started" not in states
    assert all(r["reward"] is None for r in rows if r["state"] == "tool_failed")


def test_bad_rows_fail_the_job_with_every_row_and_field_before_a_worker_is_claimed(service: Service) -> None:
    good = [json.dumps(row(index)) for index in range(10)]
    bad = ["{not json", json.dumps({"prompt": "no messages"}), json.dumps({**row(0), "tools": [_other_tool()]})]
    file = service.upload("bad.jsonl", "\n".join([*good, *bad]).encode())
    job = service.create_job("tiny-llama", training_file=file)

    ended = service.wait(job.id)

    assert ended.status == "failed"
    assert (ended.error.code, ended.error.param) == ("invalid_training_file", "training_file")
    assert ended.hone["attempt"] == 0
    listed = next(event for event in service.events(job.id) if event.level == "error").data
    assert {entry["row"] for entry in listed["problems"]} == {11, 12, 13}


def test_cancel_ends_a_running_job_at_once_and_closes_its_rollouts(service: Service) -> None:
    job = service.create_job("tiny-llama", steps=6)
    service.wait_until(job.id, lambda job: job.hone["step"] >= 1)

    cancelled = service.client.fine_tuning.jobs.cancel(job.id)

    assert cancelled.status == "cancelled"
    states = Counter(r["state"] for r in service.rollouts(job.id))
    assert "started" not in states
    service.wait_gone("workers.supervisor")
    assert not (service.data / "adapters" / job.id).exists()
    assert not list((service.data / "jobs" / job.id).glob("a*/snapshots"))
    assert service.client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"
    assert TOKEN not in cancelled.to_json(warnings=False)


def _other_tool() -> dict[str, object]:
    schema = {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": "weather", "description": "x", "parameters": schema}}
