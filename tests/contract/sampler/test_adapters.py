"""Adapters at a sampler: names, refusals, and that each version answers with its own weights."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from app.net.clients import HttpClient
from app.samplers.client import CompletionRequest, SamplerClient
from app.samplers.errors import ModelNotServed, SamplerRejected, SamplerUnavailable
from tests.contract.sampler.servers import SLOTS, AdapterMaker, Target, teacher_forced
from tests.contract.sampler.test_batching import under_way

pytestmark = pytest.mark.timeout(300)  # the first test of an engine starts it

IDS = [(11 * i + 3) % 250 for i in range(60)]
Load = Callable[[str, Path], Any]


def merged(reference: Any, path: Path, model_dir: Path) -> Any:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tensors = load_file(path / "adapter_model.safetensors")
    with torch.no_grad():
        for key, a in tensors.items():
            if key.endswith("lora_A.weight"):
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                weight = model.get_submodule(module).weight
                weight += 2.0 * tensors[key.replace("lora_A", "lora_B")] @ a
    return model


async def test_two_versions_live_at_once_and_each_gives_its_own_log_probs(
    client: SamplerClient, loaded: Load, make_adapter: AdapterMaker, reference: Any, target: Target
) -> None:
    paths = {name: make_adapter(name, seed=i) for i, name in enumerate(("own-v1", "own-v2"), 1)}
    for name, path in paths.items():
        await loaded(name, path)
    scores = await asyncio.gather(*(client.score(name, IDS) for name in (*paths, "base")))
    assert scores[0] == pytest.approx(
        teacher_forced(merged(reference, paths["own-v1"], target.model_dir), IDS), abs=1e-4
    )
    assert scores[1] == pytest.approx(
        teacher_forced(merged(reference, paths["own-v2"], target.model_dir), IDS), abs=1e-4
    )
    assert scores[2] == pytest.approx(teacher_forced(reference, IDS), abs=1e-4)


async def test_versions_do_not_share_cached_text(
    client: SamplerClient, loaded: Load, make_adapter: AdapterMaker, reference: Any, target: Target
) -> None:
    path = make_adapter("salt-v1", seed=5)
    await loaded("salt-v1", path)
    model = merged(reference, path, target.model_dir)
    for name, expected in (("base", reference), ("salt-v1", model), ("base", reference), ("salt-v1", model)):
        done = await client.complete(CompletionRequest(name, IDS, 8, timeout_s=30))
        assert done.log_probs == pytest.approx(
            teacher_forced(expected, [*IDS, *done.token_ids])[len(IDS) - 1 :], abs=5e-4
        )


async def test_an_adapter_with_b_zero_scores_exactly_as_the_base(
    client: SamplerClient, loaded: Load, make_adapter: AdapterMaker
) -> None:
    await loaded("zero-v0", make_adapter("zero-v0", scale=0.0))
    assert await client.score("zero-v0", IDS) == pytest.approx(await client.score("base", IDS), abs=1e-6)


async def test_models_tells_root_and_parent_of_an_adapter(
    client: SamplerClient, loaded: Load, make_adapter: AdapterMaker
) -> None:
    path = make_adapter("listed-v1")
    await loaded("listed-v1", path)
    served = next(m for m in await client.models() if m.id == "listed-v1")
    assert served.root == str(path)
    assert served.parent == "base" or served.parent is not None


async def test_a_name_is_loaded_once(client: SamplerClient, loaded: Load, make_adapter: AdapterMaker) -> None:
    path = make_adapter("twice-v1")
    await loaded("twice-v1", path)
    with pytest.raises(SamplerRejected, match="already been loaded"):
        await client.load_adapter("twice-v1", str(path))


@pytest.mark.parametrize("name", ["base", ""])
async def test_the_base_name_and_no_name_are_refused(
    client: SamplerClient, make_adapter: AdapterMaker, name: str
) -> None:
    with pytest.raises(SamplerRejected):
        await client.load_adapter(name, str(make_adapter("x")))


async def test_a_path_without_an_adapter_is_not_found(client: SamplerClient, tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ModelNotServed):
            await client.load_adapter("nowhere-v1", str(path))


def truncate(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


async def test_a_truncated_file_is_refused_and_the_server_stays_healthy(
    client: SamplerClient, make_adapter: AdapterMaker
) -> None:
    path = make_adapter("short-v1")
    truncate(path)
    with pytest.raises(SamplerUnavailable, match="500"):
        await client.load_adapter("short-v1", str(path))
    assert await client.health()
    assert "short-v1" not in {m.id for m in await client.models()}


def too_high(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    config["r"] = 64
    for key in tensors:
        tensors[key] = torch.zeros((64, tensors[key].shape[1]) if "lora_A" in key else (tensors[key].shape[0], 64))


def dora(config: dict[str, Any], _: dict[str, Any]) -> None:
    config["use_dora"] = True


@pytest.mark.parametrize("edit", [too_high, dora])
async def test_a_kind_of_adapter_that_cannot_be_served_is_a_500(
    client: SamplerClient, make_adapter: AdapterMaker, edit: Any
) -> None:
    with pytest.raises(SamplerUnavailable, match="500"):
        await client.load_adapter("kind-v1", str(make_adapter("kind-v1", edit=edit)))


def not_finite(_: dict[str, Any], tensors: dict[str, Any]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def incomplete(_: dict[str, Any], tensors: dict[str, Any]) -> None:
    del tensors[next(iter(tensors))]


def misshapen(_: dict[str, Any], tensors: dict[str, Any]) -> None:
    key = next(k for k in tensors if "lora_B" in k)
    tensors[key] = tensors[key][:-1].contiguous()


def wrong_rank(config: dict[str, Any], _: dict[str, Any]) -> None:
    config["r"] = 8


@pytest.mark.parametrize("edit", [not_finite, incomplete, misshapen, wrong_rank])
async def test_files_that_vllm_would_serve_as_another_policy_are_refused(
    client: SamplerClient, target: Target, make_adapter: AdapterMaker, edit: Any
) -> None:
    if not target.builtin:
        pytest.skip("vLLM loads these; the publication's proof is what catches them there")
    with pytest.raises(SamplerUnavailable, match="500"):
        await client.load_adapter("broken-v1", str(make_adapter("broken-v1", edit=edit)))


async def test_an_unloaded_name_is_not_found_and_unknown_to_unload(
    client: SamplerClient, make_adapter: AdapterMaker
) -> None:
    await client.load_adapter("gone-v1", str(make_adapter("gone-v1")))
    await client.unload_adapter("gone-v1")
    with pytest.raises(ModelNotServed):
        await client.complete(CompletionRequest("gone-v1", IDS, 4, timeout_s=30))
    with pytest.raises(ModelNotServed):
        await client.unload_adapter("gone-v1")


async def test_a_request_in_flight_finishes_on_the_weights_of_its_unloaded_adapter(
    client: SamplerClient, http: HttpClient, make_adapter: AdapterMaker, reference: Any, target: Target
) -> None:
    for attempt in range(5):  # on a busy machine the answer may come before the unload does
        name = f"flight-v{attempt}"
        path = make_adapter(name, seed=9)
        await client.load_adapter(name, str(path))
        body = {
            "model": name,
            "prompt": IDS,
            "max_tokens": 440,
            "logprobs": 0,
            "return_token_ids": True,
            "ignore_eos": True,
        }
        flight = await under_way(http, target, body)
        await client.unload_adapter(name)
        if not flight.done():
            break
        await flight
    else:
        pytest.fail("no unload came in time")
    choice = (await flight).json()["choices"][0]
    expected = teacher_forced(merged(reference, path, target.model_dir), [*IDS, *choice["token_ids"]])[len(IDS) - 1 :]
    assert len(choice["token_ids"]) == 440
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-3)


async def test_more_versions_than_the_limit_are_refused(
    client: SamplerClient, loaded: Load, make_adapter: AdapterMaker, target: Target
) -> None:
    if not target.builtin:
        pytest.skip("vLLM loads them and lets their requests wait")
    for i in range(SLOTS):
        await loaded(f"many-v{i}", make_adapter(f"many-v{i}"))
    with pytest.raises(SamplerRejected, match="max-loras"):
        await client.load_adapter("many-v4", str(make_adapter("many-v4")))


async def test_requests_for_more_versions_than_slots_wait_and_all_complete(
    client: SamplerClient, loaded: Load, make_adapter: AdapterMaker, target: Target, reference: Any
) -> None:
    if target.builtin:
        pytest.skip("the built-in engine refuses the load")
    paths = {f"queue-v{i}": make_adapter(f"queue-v{i}", seed=20 + i) for i in range(SLOTS + 2)}
    for name, path in paths.items():
        await loaded(name, path)
    requests = [CompletionRequest(name, IDS, 40, timeout_s=60) for name in paths]
    done = await asyncio.gather(*(client.complete(request) for request in requests))
    for path, completion in zip(paths.values(), done, strict=True):
        model = merged(reference, path, target.model_dir)
        expected = teacher_forced(model, [*IDS, *completion.token_ids])[len(IDS) - 1 :]
        assert completion.log_probs == pytest.approx(expected, abs=1e-3)


async def test_a_version_is_scored_while_others_are_sampled(
    client: SamplerClient, loaded: Load, make_adapter: AdapterMaker, reference: Any, target: Target
) -> None:
    """A publication's canary, beside rollouts of the version before: an engine that takes adapters at the head dies."""
    paths = {name: make_adapter(name, seed=i) for i, name in enumerate(("beside-v1", "beside-v2"), 30)}
    for name, path in paths.items():
        await loaded(name, path)
    sampled = [
        asyncio.create_task(client.complete(CompletionRequest("beside-v1", IDS, 60, timeout_s=60))) for _ in "ab"
    ]
    scores = await asyncio.gather(*(client.score("beside-v2", IDS) for _ in range(3)))
    expected = teacher_forced(merged(reference, paths["beside-v2"], target.model_dir), IDS)
    assert all(row == pytest.approx(expected, abs=1e-4) for row in scores)
    assert all([len((await task).token_ids) > 0 for task in sampled])
