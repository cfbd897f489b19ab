"""What a client sees of an engine that dies, and that nothing of a server outlives its parent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.net.clients import HttpClient
from app.samplers.client import CompletionRequest, SamplerClient
from app.samplers.errors import SamplerMisbehaved, SamplerUnavailable
from tests.contract.sampler.servers import CONTEXT, ENGINES, SHAPE, Target, running, write_adapter, write_model
from tests.contract.sampler.test_adapters import not_finite
from tests.contract.sampler.test_batching import working
from tests.processes import family, gone
from workers.process import Child

pytestmark = pytest.mark.timeout(300)


def serve(engine: str, directory: Path) -> Iterator[tuple[Child, Target]]:
    write_model(directory, "llama")
    with running(engine, directory) as (child, url):
        yield child, Target(url, directory, CONTEXT, SHAPE["vocab_size"], builtin=engine == "builtin")


@pytest.fixture(params=ENGINES)
def doomed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Child, Target]]:
    """A server of one test's own."""
    yield from serve(request.param, tmp_path)


@pytest.fixture(scope="module", params=ENGINES)
def last(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Child, Target]]:
    """One server for the last two tests; vLLM takes half a minute to start."""
    yield from serve(request.param, tmp_path_factory.mktemp("last"))


async def keep_asking(client: SamplerClient) -> None:
    while True:
        with contextlib.suppress(SamplerMisbehaved):  # vLLM, in a block that weights which are not finite have filled
            await client.complete(CompletionRequest("base", [1, 2, 3], 500, timeout_s=60))


async def test_an_engine_killed_in_mid_request_is_unavailable_and_leaves_no_process(
    doomed: tuple[Child, Target], http: HttpClient
) -> None:
    child, target = doomed
    client = SamplerClient(http, target.url)
    answered = asyncio.create_task(keep_asking(client))
    await working(http, target)
    members = family(child.pid)
    engines = [pid for pid, line in members.items() if "EngineCore" in line] or [
        pid for pid, line in members.items() if pid != child.pid and "workers.leash" not in line
    ]
    os.kill(engines[0], signal.SIGKILL)
    with pytest.raises(SamplerUnavailable):
        await answered
    async with asyncio.timeout(30):
        while child.poll() is None and not await client.engine_is_dead():
            await asyncio.sleep(0.1)
    assert not await client.health()
    child.kill()
    assert gone(child.pid)


async def test_weights_that_are_not_finite_never_give_a_completion(
    last: tuple[Child, Target], http: HttpClient, tmp_path: Path
) -> None:
    """Here, and not among the adapters: vLLM may give the next request a block that it filled."""
    _, target = last
    client = SamplerClient(http, target.url)
    path = write_adapter(tmp_path, target.model_dir, "nan-v1", edit=not_finite)
    if target.builtin:
        with pytest.raises(SamplerUnavailable, match="500"):
            await client.load_adapter("nan-v1", str(path))
    else:
        await client.load_adapter("nan-v1", str(path))
        with pytest.raises(SamplerMisbehaved, match="not JSON compliant"):
            await client.complete(CompletionRequest("nan-v1", [1, 2, 3], 4, timeout_s=30))
    assert await client.health()


async def test_a_server_whose_parent_goes_takes_all_its_processes_with_it(
    last: tuple[Child, Target], http: HttpClient
) -> None:
    child, target = last
    answered = asyncio.create_task(keep_asking(SamplerClient(http, target.url)))
    await working(http, target)
    assert len(family(child.pid)) >= 2
    child.drop_leash()  # what the kernel does when the keeper is killed
    with pytest.raises(SamplerUnavailable):
        await answered
    assert await asyncio.to_thread(gone, child.pid)
