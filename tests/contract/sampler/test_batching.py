"""Requests that run together: they join and leave at any time, share prefixes; a caller who goes frees the engine."""

import asyncio
import re
from typing import Any

import pytest

from app.net.clients import HttpClient
from app.samplers.client import CompletionRequest, SamplerClient
from tests.contract.sampler.servers import Target, teacher_forced

pytestmark = pytest.mark.timeout(300)  # the first test of an engine starts it


async def metric(http: HttpClient, target: Target, name: str) -> float:
    text = (await http.get(f"{target.url}/metrics")).text
    found = re.findall(rf"^vllm:{name}(?:{{[^}}]*}})? ([0-9.e+]+)$", text, re.MULTILINE)
    return sum(float(v) for v in found)


async def under_way(http: HttpClient, target: Target, body: dict[str, Any]) -> asyncio.Task[Any]:
    """A request that the engine works on by now; asked again if it was over before anybody looked."""
    async with asyncio.timeout(60):
        while True:
            task = asyncio.create_task(http.post(f"{target.url}/v1/completions", json=body))
            while not task.done():  # no pause: on a busy machine a timer may fire after the answer
                if await metric(http, target, "num_requests_running") and not task.done():
                    return task


async def working(http: HttpClient, target: Target) -> None:
    async with asyncio.timeout(120):  # the first request of a server may wait for kernels to be compiled
        while not await metric(http, target, "num_requests_running"):
            await asyncio.sleep(0.01)


async def idle(http: HttpClient, target: Target, within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while await metric(http, target, "num_requests_running"):
            await asyncio.sleep(0.02)


async def counted(http: HttpClient, target: Target, name: str, at_least: float) -> float:
    """The counter once it has come so far: an engine may answer before it counts."""
    async with asyncio.timeout(30):
        while (found := await metric(http, target, name)) < at_least:
            await asyncio.sleep(0.02)
    return found


def long_request(tokens: int = 500) -> dict[str, Any]:
    return {"model": "base", "prompt": [1, 2, 3], "max_tokens": tokens, "ignore_eos": True, "return_token_ids": True}


async def test_a_short_request_overtakes_a_long_one_that_started_before(
    http: HttpClient, client: SamplerClient, target: Target
) -> None:
    """An engine that serves in order of arrival is never overtaken; a real one is, but not while the machine stalls."""
    short = CompletionRequest("base", [4, 5, 6], 3, timeout_s=30)
    overtaken = False
    for _ in range(20):
        long = await under_way(http, target, long_request())
        await client.complete(short)
        overtaken = not long.done()
        assert (await long).json()["usage"]["completion_tokens"] == 500
        if overtaken:
            break
    assert overtaken


async def test_a_client_that_goes_frees_the_engine(http: HttpClient, target: Target) -> None:
    request = await under_way(http, target, long_request() | {"n": 4})
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    await idle(http, target)
    before = await metric(http, target, "generation_tokens_total")
    await asyncio.sleep(0.2)
    assert await metric(http, target, "generation_tokens_total") == before


async def test_many_that_share_a_prefix_each_get_their_own_log_probs(client: SamplerClient, reference: Any) -> None:
    shared = [(13 * i + 1) % 250 for i in range(150)]
    prompts = [shared + [(i * 17 + j) % 250 for j in range(5 + 9 * (i % 5))] for i in range(20)]
    prompts += [[*shared[:70], 9, 8, 7, i] for i in range(4)] + [[i, 3] for i in range(3)]
    done = await asyncio.gather(
        *(client.complete(CompletionRequest("base", p, 10 + i, timeout_s=60)) for i, p in enumerate(prompts))
    )
    for prompt, d in zip(prompts, done, strict=True):
        expected = teacher_forced(reference, [*prompt, *d.token_ids])[len(prompt) - 1 :]
        assert d.log_probs == pytest.approx(expected, abs=5e-4)


async def test_the_next_turn_of_an_episode_computes_only_what_is_new(
    http: HttpClient, client: SamplerClient, target: Target, reference: Any
) -> None:
    first = [(29 * i + 7) % 250 for i in range(200)]
    one = await client.complete(CompletionRequest("base", first, 40, timeout_s=30))
    before = await metric(http, target, "prefix_cache_hits_total")
    second = [*first, *one.token_ids, 31, 32, 33]
    two = await client.complete(CompletionRequest("base", second, 10, timeout_s=30))
    await counted(http, target, "prefix_cache_hits_total", before + len(second) - 3 - 1 - target.block)
    expected = teacher_forced(reference, [*second, *two.token_ids])[len(second) - 1 :]
    assert two.log_probs == pytest.approx(expected, abs=5e-4)


async def test_episodes_of_several_turns_at_once_stay_exact(client: SamplerClient, reference: Any) -> None:
    async def episode(i: int) -> list[tuple[list[int], Any]]:
        ids = [(5 * j + 2) % 250 for j in range(90)] + [i, i + 1, i // 4]
        turns = []
        for turn in range(3):
            done = await client.complete(CompletionRequest("base", ids, 6 + (i * 7 + turn) % 13, timeout_s=60))
            turns.append((ids, done))
            ids = [*ids, *done.token_ids, 100 + turn, 101, 102 + i]
        return turns

    for turns in await asyncio.gather(*(episode(i) for i in range(16))):
        for ids, done in turns:
            expected = teacher_forced(reference, [*ids, *done.token_ids])[len(ids) - 1 :]
            assert done.log_probs == pytest.approx(expected, abs=5e-4)


async def test_counters_of_the_engine_are_readable(http: HttpClient, client: SamplerClient, target: Target) -> None:
    await idle(http, target)
    before = await metric(http, target, "generation_tokens_total")
    done = await client.complete(CompletionRequest("base", [7, 8], 9, timeout_s=30))
    now = before + len(done.token_ids)
    assert await counted(http, target, "generation_tokens_total", now) == now
