"""What the built-in engine says about its load is read by the same parser as vLLM's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.requests import Request

from app.samplers.metrics import SamplerLoad, parse_load
from tests.unit.builtin.test_lane import directory, loaded
from workers.sampler.builtin.engine import Engine, Limits
from workers.sampler.builtin.generation import Generation
from workers.sampler.builtin.server import Routes
from workers.sampler.builtin.text import NoTokenizer

__all__ = ["directory"]


@pytest.fixture
def engine(directory: Path) -> Engine:
    return Engine(loaded(directory, torch.float32), NoTokenizer(), "base", Limits(2, 8, running_tokens=100))


async def text(engine: Engine) -> str:
    routes = Routes(engine, NoTokenizer(), {"gemm_gflops": {"float32": 1.0}})
    return bytes((await routes.metrics(Request({"type": "http"}))).body).decode()


def steps(engine: Engine, count: int) -> None:
    version: Any = engine.resolve("base")
    with torch.inference_mode():
        for ticket in engine._inbox.submitted:
            version.lane.waiting.append(ticket.row)
        engine._inbox.submitted.clear()
        for _ in range(count):
            engine._step(version)


async def test_an_idle_engine_is_empty(engine: Engine) -> None:
    assert parse_load(await text(engine)) == SamplerLoad(0, 0, 0.0, 0, 0)


async def test_the_cache_is_as_full_as_the_running_sequences_have_filled_it(engine: Engine) -> None:
    base = engine.resolve("base")
    engine.submit(base, Generation(tuple(range(1, 21)), 60, ignore_eos=True), lambda _: None)
    engine.submit(base, Generation(tuple(range(40, 60)), 60, ignore_eos=True), lambda _: None)
    assert parse_load(await text(engine)).waiting == 2
    steps(engine, 5)  # the prompt and its first token, then four more: the last one has no keys yet
    load = parse_load(await text(engine))
    assert (load.running, load.waiting, load.preemptions, load.generation_tokens) == (1, 1, 0, 5)
    # 20 + 4 positions of 100, less what moved into the shared cache when the prompt was done.
    assert 0.04 <= load.kv_usage <= 0.24


async def test_every_name_that_vllm_has_and_we_use_is_there(engine: Engine) -> None:
    said = await text(engine)
    for name in ("kv_cache_usage_perc", "prompt_tokens_total", "prefix_cache_queries_total", "prefix_cache_hits_total"):
        assert f"\nvllm:{name} " in said
