"""A sampler to run the protocol's suite against: the built-in engine on tiny models, and vLLM where there is one.

HONE_TEST_VLLM_PYTHON names the Python of vLLM's environment (`make test-vllm`). HONE_TEST_SAMPLER_URL and
HONE_TEST_SAMPLER_MODEL_DIR point the same tests at a server that already runs (fp32, four LoRA slots) and serves that
directory as `base`. Does not cover: the speed of either.
"""

from __future__ import annotations

import functools
import json
import os
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from app.net.clients import HttpClient, operator_client
from app.samplers.client import SamplerClient
from tests.contract.sampler.servers import (
    CONTEXT,
    ENGINES,
    SHAPE,
    AdapterMaker,
    Target,
    running,
    write_adapter,
    write_model,
)


@pytest.fixture(scope="session", params=[f"{engine}-{family}" for engine in ENGINES for family in ("llama", "qwen3")])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    if url := os.environ.get("HONE_TEST_SAMPLER_URL"):
        directory = Path(os.environ["HONE_TEST_SAMPLER_MODEL_DIR"])
        config = json.loads((directory / "config.json").read_text())
        with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
            length = next(m["max_model_len"] for m in json.load(answer)["data"] if m["id"] == "base")
        yield Target(url, directory, length, config["vocab_size"], builtin=False)
        return
    engine, family = request.param.split("-")
    directory = tmp_path_factory.mktemp(request.param)
    write_model(directory, family)
    with running(engine, directory) as (_, url):
        yield Target(url, directory, CONTEXT, SHAPE["vocab_size"], builtin=engine == "builtin")


@pytest.fixture
async def http() -> AsyncIterator[HttpClient]:
    async with operator_client(timeout_s=60) as client:
        yield client


@pytest.fixture
def client(http: HttpClient, target: Target) -> SamplerClient:
    return SamplerClient(http, target.url)


@pytest.fixture(scope="session")
def reference(target: Target) -> Any:
    """The same weights in plain transformers, fp32."""
    return AutoModelForCausalLM.from_pretrained(target.model_dir, dtype=torch.float32).eval()


@pytest.fixture
def make_adapter(target: Target, tmp_path: Path) -> AdapterMaker:
    """`servers.write_adapter` for the target's model."""
    return functools.partial(write_adapter, tmp_path, target.model_dir)


@pytest.fixture
async def loaded(client: SamplerClient) -> AsyncIterator[Callable[[str, Path], Any]]:
    """Load an adapter for the duration of one test."""
    names: list[str] = []

    async def load(name: str, path: Path) -> None:
        await client.load_adapter(name, str(path))
        names.append(name)

    yield load
    for name in names:
        if name in {m.id for m in await client.models()}:
            await client.unload_adapter(name)
