"""One sampler as a run sees it: quiet for a fingerprint, and never starved for it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from app.samplers.client import CompletionRequest
from tests.unit.workers.fake_engine import FakeSamplers
from tests.unit.workers.serving import asks, version
from workers.sampler import station as station_module
from workers.sampler.policy import ServedPolicy

pytestmark = pytest.mark.usefixtures("no_pauses")


async def test_a_quiet_station_lets_turns_end_and_none_begin(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    engine = await samplers.add("a")
    await policy.publish(0, version(0, tmp_path))
    (station,) = policy.stations(0)

    began = asyncio.Event()

    async def takes_a_while(request: CompletionRequest) -> None:
        began.set()
        await asyncio.sleep(0.05)

    engine.before = takes_a_while
    running = asyncio.create_task(policy.turn(asks(request_id="r-0")))
    await began.wait()
    async with station.quiet() as empty:
        assert empty
        assert running.done()
        waiting = asyncio.create_task(policy.turn(asks(request_id="r-1")))
        await asyncio.sleep(0.1)
        assert len(engine.requests) == 1
    await waiting
    assert len(engine.requests) == 2


async def test_a_busy_station_is_not_starved_for_quiet(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(station_module, "QUIET_WAIT_S", 0.05)
    engine = await samplers.add("a")
    await policy.publish(0, version(0, tmp_path))
    (station,) = policy.stations(0)
    release = asyncio.Event()

    async def hang(request: CompletionRequest) -> None:
        await release.wait()

    engine.before = hang
    turns = [asyncio.create_task(policy.turn(asks(request_id=f"r{n}-0"))) for n in range(2)]
    while station.in_flight < 2:
        await asyncio.sleep(0)
    async with station.quiet() as empty:
        assert not empty
    turns += [asyncio.create_task(policy.turn(asks(request_id=f"s{n}-0"))) for n in range(station_module.QUIET_TURNS)]
    while station.in_flight < 2 + station_module.QUIET_TURNS:
        await asyncio.sleep(0)
    monkeypatch.setattr(station_module, "QUIET_WAIT_S", 30.0)
    began = time.monotonic()
    async with station.quiet() as empty:
        assert not empty
        assert time.monotonic() - began < 20
    release.set()
    assert len(await asyncio.gather(*turns)) == 2 + station_module.QUIET_TURNS
