"""What a run reads before its first rollout, and what is wrong early enough to cost nothing."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.core.settings import Settings
from app.db.engine import Database
from app.db.tables import Job
from app.files import service as files
from app.files.storage import Shelf, Storage
from app.jobs.headers import seal_headers
from app.jobs.plan import Plan
from app.security.vault import load_vault
from app.tools.http import ToolEndpoint
from tests.db.rows import METHOD, Seed
from tests.tiny import make_weightless_llama
from workers.rollouts.types import Row
from workers.setup import (
    CANARY_SCORED,
    CANARY_TOKENS,
    Inputs,
    JobFailure,
    _canary,
    dial_endpoints,
    read_inputs,
    write_canary,
)

PLAN = Plan(
    train_rows=6,
    valid_rows=2,
    batch_size=2,
    n_epochs=1,
    group_size=4,
    total_steps=3,
    learning_rate=1e-4,
    learning_rate_multiplier=1.0,
    compute_multiplier=1.0,
    eval_interval=1,
    eval_samples=1,
    max_episode_steps=5,
    max_tokens_per_turn=64,
    max_tokens_per_episode=256,
    tool_timeout_s=7.0,
    grader_timeout_s=8.0,
    rollout_timeout_s=90.0,
    max_staleness=0,
    importance_range=(0.5, 2.0),
    max_sequence_tv=0.25,
    kl_beta=0.0,
    on_no_signal="stop",
    max_trained_rollouts=None,
    loss_type="dapo",
    lora_rank=4,
    lora_alpha=8,
    lora_targets=("q_proj",),
    temperature=1.0,
    seed=7,
)
TOOL = {"name": "lookup", "server_url": "http://127.0.0.1:9/lookup", "headers": {}}


def lines(count: int) -> bytes:
    words = "word " * 300  # longer than a canary sequence
    made = ({"messages": [{"role": "user", "content": f"{words}{n}"}], "answer": str(n)} for n in range(count))
    return b"\n".join(json.dumps(row).encode() for row in made)


async def inputs_of(settings: Settings, database: Database, seed: Seed, **method: Any) -> Inputs:
    make_weightless_llama(settings.models_dir / "tiny")
    sealed = seal_headers({"reinforcement": method}, load_vault(None, settings.root), "ftjob-1")["reinforcement"]
    reinforcement = {**METHOD["reinforcement"], **sealed}
    job_id = await seed.job(
        id="ftjob-1",
        status="running",
        plan=PLAN.as_dict(),
        training_file=await seed.file(lines(6)),
        validation_file=await seed.file(lines(2)),
        method={"type": "reinforcement", "reinforcement": reinforcement},
    )
    async with database.read() as session:
        job = await session.get(Job, job_id)
    assert job is not None
    with ThreadPoolExecutor(1) as executor:
        return await read_inputs(settings, job, await shelf(settings, database, job), executor)


async def shelf(settings: Settings, database: Database, job: Job) -> Shelf:
    async with database.read() as session:
        return await files.shelf(session, Storage.of(settings), [job.training_file, str(job.validation_file)])


async def test_rows_limits_and_endpoints_come_from_the_job(settings: Settings, database: Database, seed: Seed) -> None:
    inputs = await inputs_of(settings, database, seed, tools=[TOOL])
    assert [row.index for row in inputs.train] == [0, 1, 2, 3, 4, 5]
    assert [row.item["answer"] for row in inputs.valid] == ["0", "1"]
    assert inputs.plan == PLAN
    limits = inputs.limits
    assert (limits.max_steps, limits.max_tokens_per_turn, limits.max_tokens_per_episode) == (5, 64, 256)
    assert (limits.tool_timeout_s, limits.grader_timeout_s, limits.rollout_timeout_s) == (7.0, 8.0, 90.0)
    assert limits.context == 2048  # the model's, below the sampler's
    assert inputs.endpoints == {"lookup": ToolEndpoint("lookup", TOOL["server_url"], {})}
    await inputs.http.aclose()


async def test_every_endpoint_hides_the_secrets_of_the_whole_job(
    settings: Settings, database: Database, seed: Seed
) -> None:
    tools = [{**TOOL, "headers": {"A": "tool-secret"}}, {**TOOL, "name": "other", "headers": {"A": "other-secret"}}]
    part = {"type": "endpoint", "name": "g", "url": "http://127.0.0.1:9/g", "headers": {"A": "grader-secret"}}
    grader = {"type": "multi", "name": "m", "graders": {"g": part}, "calculate_output": "g"}
    inputs = await inputs_of(settings, database, seed, tools=tools, grader=grader)
    for endpoint in inputs.endpoints.values():
        assert endpoint.mask("tool-secret other-secret grader-secret") == "*** *** ***"
    await inputs.http.aclose()


async def test_the_context_is_what_the_sampler_serves_when_that_is_less(
    settings: Settings, database: Database, seed: Seed
) -> None:
    inputs = await inputs_of(settings.model_copy(update={"sampler_max_model_len": 512}), database, seed)
    assert inputs.limits.context == 512
    await inputs.http.aclose()


def test_short_prompts_make_a_canary_of_more_of_them() -> None:
    class Letters:
        def prompt(self, messages: list[dict[str, str]], tools: None) -> list[int]:
            return [ord(letter) for letter in messages[0]["content"]]

    def rows(*texts: str) -> list[Row]:
        return [Row(n, {"messages": [{"role": "user", "content": text}]}) for n, text in enumerate(texts)]

    renderer: Any = Letters()
    made = _canary(renderer, rows(*(f"{n:03}{'x' * 27}" for n in range(100))))
    assert len(made) == 9  # of 29 scored tokens
    assert sum(len(ids) - 1 for ids in made) >= CANARY_SCORED
    assert len(_canary(renderer, rows(*["the same"] * 50))) == 1
    assert len(_canary(renderer, rows("one", "two"))) == 2


async def test_the_canary_is_a_few_real_prompts_cut_to_size(
    settings: Settings, database: Database, seed: Seed, tmp_path: Path
) -> None:
    inputs = await inputs_of(settings, database, seed)
    assert [len(ids) for ids in inputs.canary] == [CANARY_TOKENS] * 2
    path = write_canary(tmp_path / "a1" / "canary.json", inputs.canary)
    assert json.loads(Path(path).read_text()) == inputs.canary
    await inputs.http.aclose()


async def test_a_model_that_is_gone_fails_the_job(settings: Settings, database: Database, seed: Seed) -> None:
    job_id = await seed.job(status="running", plan=PLAN.as_dict())
    async with database.read() as session:
        job = await session.get(Job, job_id)
    assert job is not None
    with ThreadPoolExecutor(1) as executor, pytest.raises(JobFailure) as caught:
        await read_inputs(settings, job, await shelf(settings, database, job), executor)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


ENDPOINT = {"type": "endpoint", "name": "g", "url": "http://down.test/grade"}


async def test_every_endpoint_is_dialled_once_and_the_silent_one_named(
    settings: Settings, database: Database, seed: Seed
) -> None:
    inputs = await inputs_of(settings, database, seed)
    await inputs.http.aclose()
    dialled: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        dialled.append(str(request.url))
        if request.url.host == "down.test":
            raise httpx.ConnectError("refused")
        return httpx.Response(405)

    tools = {name: ToolEndpoint(name, "http://up.test/tools", {}) for name in ("a", "b")}
    http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    up = replace(inputs, http=http, endpoints=tools, grader_urls={})  # type: ignore[arg-type]
    await dial_endpoints(up)
    assert dialled == ["http://up.test/tools"]
    down = replace(up, grader_urls={"method.reinforcement.grader.url": ENDPOINT["url"]})
    with pytest.raises(JobFailure, match=r"http://down.test/grade does not answer .*No rollout was started") as caught:
        await dial_endpoints(down)
    assert (caught.value.code, caught.value.param) == ("grader_unreachable", "method.reinforcement.grader.url")
    bad_tool = replace(up, endpoints={"x": ToolEndpoint("x", "http://down.test/x", {})})
    with pytest.raises(JobFailure) as caught:
        await dial_endpoints(bad_tool)
    assert (caught.value.code, caught.value.param) == ("tool_unreachable", "method.reinforcement.tools (x)")
    await http.aclose()


async def test_graders_inside_a_multi_grader_are_dialled_too(
    settings: Settings, database: Database, seed: Seed
) -> None:
    inner = {"type": "endpoint", "name": "inner", "url": "http://127.0.0.1:9/inner"}
    multi = {"type": "multi", "name": "m", "graders": {"a": inner}, "calculate_output": "a"}
    inputs = await inputs_of(settings, database, seed, grader=multi)
    assert inputs.grader_urls == {"method.reinforcement.grader.graders.a.url": "http://127.0.0.1:9/inner"}
    await inputs.http.aclose()
