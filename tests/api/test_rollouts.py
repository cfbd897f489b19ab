"""Rollouts of a job over HTTP: the filtered ledger and one trace. Traces are written as a worker writes them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai import OpenAI

from app.core.settings import Settings
from app.core.states import RolloutState
from app.db.engine import Database
from app.rollouts.traces import append_trace, pack
from tests.api.live_server import LiveServer
from tests.db.rows import Seed


@pytest.fixture
def seed(database: Database, settings: Settings) -> Seed:
    return Seed(database, settings)


def listed(http: httpx.Client, job_id: str, **asked: Any) -> list[str]:
    answer = http.get(f"/v1/fine_tuning/jobs/{job_id}/rollouts", params=asked)
    assert answer.status_code == 200, answer.text
    return [rollout["id"] for rollout in answer.json()["data"]]


async def test_the_list_is_filtered(http: httpx.Client, seed: Seed) -> None:
    job_id = await seed.job()
    low = await seed.rollout(job_id, reward=0.1, step=1, invalid_calls=1)
    high = await seed.rollout(job_id, reward=0.9, step=2)
    greedy = await seed.rollout(job_id, RolloutState.EVALUATED, split="valid", greedy=True, step=2, reward=0.5)
    broken = await seed.rollout(job_id, RolloutState.TOOL_FAILED, step=2, error="no answer")
    await seed.rollout(await seed.job())
    assert listed(http, job_id) == [broken, greedy, high, low]
    assert listed(http, job_id, order="asc") == [low, high, greedy, broken]
    assert listed(http, job_id, step=1) == [low]
    assert listed(http, job_id, split="valid") == [greedy]
    assert listed(http, job_id, greedy="true") == [greedy]
    assert listed(http, job_id, state="tool_failed") == [broken]
    assert listed(http, job_id, min_reward=0.5) == [greedy, high]
    assert listed(http, job_id, max_reward=0.5, split="train") == [low]
    assert listed(http, job_id, tool_error="true") == [broken, low]
    assert listed(http, job_id, tool_error="false") == [greedy, high]


async def test_a_filter_out_of_range_is_a_400_that_names_it(http: httpx.Client, seed: Seed) -> None:
    path = f"/v1/fine_tuning/jobs/{await seed.job()}/rollouts"
    assert http.get(path, params={"step": 10**20}).status_code == 400
    wrong = {"state": "happy", "split": "test", "step": "-1", "limit": "0", "min_reward": "nan", "order": "up"}
    for name, value in wrong.items():
        answer = http.get(path, params={name: value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


async def test_the_list_is_paged(http: httpx.Client, seed: Seed) -> None:
    job_id = await seed.job()
    made = [await seed.rollout(job_id) for _ in range(3)]
    seen: list[str] = []
    while page := listed(http, job_id, limit=2, **({"after": seen[-1]} if seen else {})):
        seen += page
    assert seen == made[::-1]
    assert http.get(f"/v1/fine_tuning/jobs/{job_id}/rollouts?after=nothing").status_code == 400


async def test_one_rollout_comes_with_its_whole_trace(client: OpenAI, seed: Seed, settings: Settings) -> None:
    job_id = await seed.job()
    file = f"{job_id}/a1/step-1.jsonl.zst"
    append_trace(settings.traces_dir / file, {"messages": []})
    trace = {"messages": [{"role": "user", "content": "hi"}], "tokens": {"ids": pack([1, 2], "ids")}}
    offset, length = append_trace(settings.traces_dir / file, trace)
    rollout_id = await seed.rollout(job_id, trace_file=file, trace_offset=offset, trace_length=length, reward=0.5)
    shown: Any = client.get(f"/fine_tuning/jobs/{job_id}/rollouts/{rollout_id}", cast_to=object)
    assert shown["id"] == rollout_id
    assert shown["reward"] == 0.5
    assert shown["trace"] == {"messages": trace["messages"], "tokens": {"ids": [1, 2]}}


async def test_a_trace_that_is_gone_leaves_the_row(http: httpx.Client, seed: Seed) -> None:
    job_id = await seed.job()
    rollout_id = await seed.rollout(job_id, trace_file="x/y.zst", trace_offset=0, trace_length=9)
    shown = http.get(f"/v1/fine_tuning/jobs/{job_id}/rollouts/{rollout_id}").json()
    assert shown["trace"] is None
    assert "gone" in shown["trace_error"]


async def test_a_trace_of_another_rollout_or_a_damaged_one_is_not_shown(
    http: httpx.Client, seed: Seed, settings: Settings
) -> None:
    job_id = await seed.job()
    file = f"{job_id}/a1/step-1.jsonl.zst"
    offset, length = append_trace(settings.traces_dir / file, {"id": "another", "messages": []})
    rollout_id = await seed.rollout(job_id, trace_file=file, trace_offset=offset, trace_length=length, reward=0.5)

    def said() -> str:
        shown = http.get(f"/v1/fine_tuning/jobs/{job_id}/rollouts/{rollout_id}").json()
        assert (shown["trace"], shown["reward"]) == (None, 0.5)
        return str(shown["trace_error"])

    assert "gone" in said()
    with (settings.traces_dir / file).open("r+b") as stream:
        stream.seek(length // 2)
        stream.write(b"\0\0")
    assert "damaged" in said()


async def test_rollouts_of_another_job_or_project_are_not_found(
    http: httpx.Client, live_server: LiveServer, other_key: str, seed: Seed
) -> None:
    job_id, other = await seed.job(), await seed.job()
    rollout_id = await seed.rollout(job_id)
    missing = http.get(f"/v1/fine_tuning/jobs/{other}/rollouts/{rollout_id}")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "rollout_not_found")
    headers = {"authorization": f"Bearer {other_key}"}
    for path in (f"{job_id}/rollouts", f"{job_id}/rollouts/{rollout_id}"):
        answer = httpx.get(f"{live_server.base_url}/fine_tuning/jobs/{path}", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "fine_tune_not_found")
