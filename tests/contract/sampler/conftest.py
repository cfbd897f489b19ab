"""A sampler to run the protocol's suite against: the built-in engine on a tiny model, or any server that already runs.

HONE_TEST_SAMPLER_URL and HONE_TEST_SAMPLER_MODEL_DIR point the same tests at another server (vLLM with --enable-lora,
--dtype float32); it must serve the directory under the name `base`. Does not cover: the speed of either.
"""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from app.net.clients import HttpClient, operator_client
from app.samplers.client import SamplerClient
from tests.contract.sampler.servers import AdapterMaker, Target, start_builtin, write_model


@pytest.fixture(scope="session", params=["llama", "qwen3"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    if url := os.environ.get("HONE_TEST_SAMPLER_URL"):
        directory = Path(os.environ["HONE_TEST_SAMPLER_MODEL_DIR"])
        config = json.loads((directory / "config.json").read_text())
        with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
            length = next(m["max_model_len"] for m in json.load(answer)["data"] if m["id"] == "base")
        yield Target(url, directory, length, config["vocab_size"], builtin=False)
        return
    directory = tmp_path_factory.mktemp(request.param)
    write_model(directory, request.param)
    process, url = start_builtin(directory)
    yield Target(url, directory, 512, 288, builtin=True)
    process.terminate()
    assert process.wait(10) is not None


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
    """make_adapter(name, seed=…, scale=…, edit=…): PEFT files, all linear layers; `edit` breaks them."""

    def make(
        name: str,
        *,
        seed: int = 0,
        scale: float = 0.3,
        edit: Callable[[dict[str, Any], dict[str, Any]], None] | None = None,
    ) -> Path:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(target.model_dir))
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for module, layer in skeleton.named_modules():
            if isinstance(layer, torch.nn.Linear) and "lm_head" not in module:
                key = f"base_model.model.{module}.lora"
                tensors[f"{key}_A.weight"] = torch.randn(4, layer.in_features, generator=generator) * 0.2
                tensors[f"{key}_B.weight"] = torch.randn(layer.out_features, 4, generator=generator) * scale
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(target.model_dir), "r": 4,
            "lora_alpha": 8, "bias": "none", "use_rslora": False, "use_dora": False, "inference_mode": True,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        }  # fmt: skip
        if edit is not None:
            edit(config, tensors)
        path = tmp_path / name
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, path / "adapter_model.safetensors")
        return path

    return make


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
