"""Several samplers under one policy: where a rollout goes, who takes over, what a sampler elsewhere is told."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from app.core.settings import Settings
from app.samplers.client import Completion, CompletionRequest
from app.samplers.errors import SamplerUnavailable
from app.samplers.service import Adapter
from tests.unit.workers.fake_engine import FakeSamplers
from tests.unit.workers.serving import HOLDER, asks, version
from workers.sampler import parting as parting_module
from workers.sampler import policy as policy_module
from workers.sampler.policy import ServedPolicy
from workers.sampler.proof import Unproved
from workers.sampler.station import Station

pytestmark = pytest.mark.usefixtures("no_pauses")


async def test_a_rollout_stays_at_the_sampler_that_has_its_prefix_though_another_is_idle(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    first, _ = await samplers.add("a"), await samplers.add("b")
    await policy.publish(0, version(0, tmp_path))
    assert (await policy.turn(asks(request_id="r-x-0"))).sampler == "sampler-a"
    release = asyncio.Event()

    async def hang(request: CompletionRequest) -> None:
        if request.request_id == "r-x-1":
            await release.wait()

    first.before = hang
    others = [asyncio.create_task(policy.turn(asks(request_id=f"r-x-{turn}"))) for turn in (1, 2)]
    await others[1]
    assert others[1].result().sampler == "sampler-a"
    release.set()
    assert (await others[0]).sampler == "sampler-a"


async def test_a_new_rollout_goes_where_the_fewest_turns_are(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    busy, idle = await samplers.add("a"), await samplers.add("b")
    await policy.publish(0, version(0, tmp_path))
    release = asyncio.Event()

    async def hang(request: CompletionRequest) -> None:
        await release.wait()

    busy.before = hang
    first = asyncio.create_task(policy.turn(asks(request_id="r0-0")))  # the tie goes to a
    while not busy.requests:
        await asyncio.sleep(0)
    for number in range(1, 4):
        assert (await policy.turn(asks(request_id=f"r{number}-0"))).sampler == "sampler-b"
    release.set()
    assert (await first).sampler == "sampler-a"
    assert len(idle.requests) == 3


async def test_when_a_sampler_dies_its_turns_go_on_at_another_at_once_and_whole(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_module, "RETRY_PAUSE_S", 30.0)  # nobody waits for the one that died
    first, second = await samplers.add("a"), await samplers.add("b")
    await policy.publish(0, version(0, tmp_path))
    home = (await policy.turn(asks(request_id="r-0"))).sampler
    dies, lives = (first, second) if home == "sampler-a" else (second, first)

    async def die(request: CompletionRequest) -> Completion | None:
        dies.dead = True
        raise SamplerUnavailable("Server disconnected without sending a response", url=dies.url)

    dies.before = die
    history = (1, 2, 5, 0, 9)
    found = await asyncio.wait_for(policy.turn(asks(request_id="r-1", prompt_ids=history)), 5)
    assert (found.sampler, found.token_ids) == (f"sampler-{lives.url.removeprefix('http://')}", (5, 0))
    assert [request.prompt_ids for request in (*dies.requests, *lives.requests)][-2:] == [history, history]
    assert (await policy.turn(asks(request_id="r-2"))).sampler == found.sampler


async def test_a_sampler_that_appears_later_gets_every_version_and_takes_its_share(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_module, "KEEP_S", 0.01)
    await samplers.add("a")
    for number in (0, 1):
        await policy.publish(number, version(number, tmp_path))
    proved: list[tuple[str, int]] = []

    async def prove(station: Station, number: int, adapter: Adapter) -> None:
        assert adapter.name in late.adapters
        proved.append((station.sampler.id, number))

    policy.prover = prove
    late = await samplers.add("late")
    keeping = asyncio.create_task(policy.keep())
    while len(policy.stations(1)) < 2:
        await asyncio.sleep(0.01)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    assert proved == [("sampler-late", 0), ("sampler-late", 1)]
    used = {(await policy.turn(asks(1, request_id=f"r{n}-0"))).sampler for n in range(2)}
    assert used == {"sampler-a", "sampler-late"}


async def test_nothing_is_asked_of_a_sampler_that_could_not_prove_the_version(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    good, bad = await samplers.add("a"), await samplers.add("b")
    await policy.publish(0, version(0, tmp_path))

    async def prove(station: Station, number: int, adapter: Adapter) -> None:
        if station.sampler.id == "sampler-b":
            raise Unproved("gate A", sampler=station.sampler.url)

    policy.prover = prove
    await policy.publish(1, version(1, tmp_path))
    for number in range(4):
        await policy.turn(asks(1, request_id=f"r{number}-0"))
        await policy.turn(asks(0, request_id=f"s{number}-0"))
    assert {request.model for request in bad.requests} == {f"{HOLDER}-v0"}
    assert {request.model for request in good.requests} == {f"{HOLDER}-v1"}


async def test_a_sampler_that_only_hiccuped_is_not_proved_again(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    engine = await samplers.add("a")
    proofs: list[int] = []

    async def prove(station: Station, number: int, adapter: Adapter) -> None:
        proofs.append(number)

    policy.prover = prove
    await policy.publish(0, version(0, tmp_path))

    async def once(request: CompletionRequest) -> Completion | None:
        if len(engine.requests) == 1:
            raise SamplerUnavailable("500", url=engine.url)
        return None

    engine.before = once
    await policy.turn(asks())
    assert proofs == [0]
    engine.adapters.clear()  # a restart under the same address: what is loaded anew is proved anew
    await policy.turn(asks())
    assert proofs == [0, 0]


async def test_a_sampler_elsewhere_is_given_the_path_as_it_sees_it(
    samplers: FakeSamplers, policy: ServedPolicy, settings: Settings
) -> None:
    engine = await samplers.add("a", root="/mnt/hone")
    settings.adapters_dir.mkdir()
    adapter = version(0, settings.adapters_dir)
    await policy.publish(0, adapter)
    assert engine.adapters == {adapter.name: f"/mnt/hone/adapters/{adapter.name}"}
    await policy.retire(0)
    assert not Path(adapter.path).exists()


async def test_a_version_leaves_only_after_its_last_turn(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_module, "KEEP_S", 0.01)
    engine = await samplers.add("a")
    adapter = version(0, tmp_path)
    await policy.publish(0, adapter)
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def slow(request: CompletionRequest) -> None:
        asked.set()
        await go_on.wait()

    engine.before = slow
    turn = asyncio.create_task(policy.turn(asks()))
    await asked.wait()
    await policy.retire(0)
    assert adapter.name in engine.adapters
    assert Path(adapter.path).exists()
    go_on.set()
    assert (await turn).model == adapter.name
    keeping = asyncio.create_task(policy.keep())
    while Path(adapter.path).exists():
        await asyncio.sleep(0.01)
    assert engine.adapters == {}
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


async def test_a_directory_outlives_a_turn_that_was_cancelled_a_moment_ago(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parting_module, "LETS_GO_S", 0.3)
    engine = await samplers.add("a")
    adapter = version(0, tmp_path)
    await policy.publish(0, adapter)
    asked = asyncio.Event()

    async def hang(request: CompletionRequest) -> None:
        asked.set()
        await asyncio.Event().wait()

    engine.before = hang
    turn = asyncio.create_task(policy.turn(asks()))
    await asked.wait()
    turn.cancel()
    await asyncio.gather(turn, return_exceptions=True)
    retiring = asyncio.create_task(policy.retire(0))
    await asyncio.sleep(0.1)
    assert Path(adapter.path).exists()
    await retiring
    assert not Path(adapter.path).exists()


async def test_every_sampler_in_use_tells_its_load_and_one_that_cannot_is_left_out(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    first, second = await samplers.add("a"), await samplers.add("b")
    await policy.publish(0, version(0, tmp_path))
    first.others = 3
    assert sorted(load.running for load in await policy.loads()) == [0, 3]
    second.dead = True
    assert [load.running for load in await policy.loads()] == [3]
