"""The policy a run samples from: what a restart, an abort or a dead engine costs, and who may delete a version."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path

import pytest

from app.db.engine import Database
from app.samplers import repository
from app.samplers.client import Completion, CompletionRequest
from app.samplers.errors import SamplerMisbehaved, SamplerUnavailable
from app.samplers.service import Adapter
from tests.unit.workers.fake_engine import FakeSamplers, answer_of
from tests.unit.workers.serving import HOLDER, asks, replace_sampler, version
from workers.sampler import policy as policy_module
from workers.sampler.policy import NoLiveSampler, ServedPolicy
from workers.sampler.proof import Unproved
from workers.sampler.station import Station

pytestmark = pytest.mark.usefixtures("no_pauses")


async def test_a_turn_is_asked_at_the_version_of_its_rollout(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    engine = await samplers.add("a")
    for number in (0, 1):
        await policy.publish(number, version(number, tmp_path))
    found = await policy.turn(asks(0, temperature=0.0))
    (request,) = engine.requests
    assert found.model == request.model == f"{HOLDER}-v0"
    assert (request.temperature, request.max_tokens, request.stop, request.prompt_ids) == (0.0, 7, ("}",), (1, 2))


async def test_after_a_restart_all_versions_are_loaded_before_the_turn_is_asked_again(
    database: Database, samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    old = await samplers.add("old")
    for number in (0, 1):
        await policy.publish(number, version(number, tmp_path))
    new = await replace_sampler(database, samplers, old, "new")
    found = await policy.turn(asks(1))
    assert found.model == f"{HOLDER}-v1"
    assert [name for _, name in new.calls] == [f"{HOLDER}-v0", f"{HOLDER}-v1"]
    assert len(new.requests) == 1
    async with database.read() as session:
        assert await repository.pinned(session, "sampler-new", f"{HOLDER}-v1")


async def test_an_engine_that_lost_its_adapters_gets_them_again(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    engine = await samplers.add("a")
    await policy.publish(0, version(0, tmp_path))
    engine.adapters.clear()
    assert (await policy.turn(asks())).model == f"{HOLDER}-v0"
    assert engine.calls == [("load", f"{HOLDER}-v0")] * 2


async def test_an_aborted_answer_is_asked_again_and_never_returned(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    engine = await samplers.add("a")
    await policy.publish(0, version(0, tmp_path))

    async def abort_once(request: CompletionRequest) -> Completion | None:
        return answer_of(request, "abort") if len(engine.requests) == 1 else None

    engine.before = abort_once
    assert (await policy.turn(asks())).finish_reason == "stop"
    assert len(engine.requests) == 2


async def test_hundreds_of_turns_that_fail_together_recover_together(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_module, "RETRY_PAUSE_S", 0.1)
    engine = await samplers.add("a")
    await policy.publish(0, version(0, tmp_path))
    arrived = asyncio.Event()

    async def fail_first(request: CompletionRequest) -> Completion | None:
        if len(engine.requests) == 100:
            arrived.set()
        if not arrived.is_set() or len(engine.requests) == 100:
            await arrived.wait()
            raise SamplerUnavailable("the engine is restarting", url=engine.url)
        return None

    engine.before = fail_first
    began = time.monotonic()
    found = await asyncio.gather(*(policy.turn(asks(request_id=f"t{n}-0")) for n in range(100)))
    assert len(found) == 100
    assert time.monotonic() - began < 3  # one after the other it was ten seconds
    assert len(engine.calls) < 5


async def test_a_dead_engine_is_waited_for_until_the_deadline_and_not_longer(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    engine = await samplers.add("a")
    await policy.publish(0, version(0, tmp_path))
    engine.dead = True
    began = time.monotonic()
    with pytest.raises(SamplerUnavailable):
        await policy.turn(asks(seconds=0.2))
    assert 0.15 < time.monotonic() - began < 2


async def test_an_engine_that_lives_and_always_fails_is_given_up_at_the_deadline_with_its_own_words(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    engine = await samplers.add("a")
    await policy.publish(0, version(0, tmp_path))

    async def fail(request: CompletionRequest) -> Completion | None:
        raise SamplerUnavailable("500: out of blocks", url=engine.url)

    engine.before = fail
    with pytest.raises(SamplerUnavailable, match="out of blocks"):
        await asyncio.wait_for(policy.turn(asks(seconds=0.2)), 5)
    assert len(engine.requests) > 1


async def test_a_turn_that_every_engine_dies_of_is_given_up_long_before_its_deadline(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    engine = await samplers.add("a")
    await policy.publish(0, version(0, tmp_path))

    async def die(request: CompletionRequest) -> Completion | None:
        raise SamplerUnavailable("the engine died", url=engine.url)

    engine.before = die
    with pytest.raises(SamplerUnavailable, match="the engine died"):
        await asyncio.wait_for(policy.turn(asks(seconds=300)), 30)
    assert len(engine.requests) == 6


async def test_without_any_sampler_the_error_has_the_keepers_reason(
    database: Database, samplers: FakeSamplers, policy: ServedPolicy
) -> None:
    await samplers.want("tiny")
    async with database.begin() as session:
        await repository.set_want_error(session, "tiny", "out of memory")
    with pytest.raises(NoLiveSampler, match="out of memory"):
        await policy.start(0.05)


async def test_an_answer_that_breaks_the_protocol_is_not_asked_again(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    engine = await samplers.add("a")
    await policy.publish(0, version(0, tmp_path))

    async def lie(request: CompletionRequest) -> Completion | None:
        raise SamplerMisbehaved("another model answered", url=engine.url)

    engine.before = lie
    with pytest.raises(SamplerMisbehaved):
        await policy.turn(asks())
    assert len(engine.requests) == 1


async def test_versions_are_loaded_into_every_live_sampler_and_turns_are_spread(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    engines = [await samplers.add(name) for name in ("a", "b")]
    await policy.publish(0, version(0, tmp_path))
    for number in range(6):
        await policy.turn(asks(request_id=f"t{number}-0"))
    assert [len(engine.requests) for engine in engines] == [3, 3]


async def test_a_sampler_replaced_while_nothing_was_sampled_costs_nothing(
    database: Database, samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    old = await samplers.add("old")
    await policy.publish(0, version(0, tmp_path))
    new = await replace_sampler(database, samplers, old, "new")
    await policy.publish(1, version(1, tmp_path))
    assert set(new.adapters) == {f"{HOLDER}-v0", f"{HOLDER}-v1"}
    for _ in range(4):  # never the one that is gone
        assert await policy.score(f"{HOLDER}-v1", [[1, 2]]) == [[-1.0]]


@pytest.mark.parametrize("trouble", ["memory", "mount"])
async def test_a_restarted_sampler_that_cannot_load_a_proved_version_yet_is_asked_again(
    database: Database, samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path, trouble: str
) -> None:
    old = await samplers.add("old")
    adapter = version(0, tmp_path)
    await policy.publish(0, adapter)
    new = await replace_sampler(database, samplers, old, "new")
    if trouble == "memory":
        new.refuses = 2
    else:
        new.hidden = {adapter.path}
    turn = asyncio.create_task(policy.turn(asks()))
    async with asyncio.timeout(20):
        while len(new.calls) < 3:
            await asyncio.sleep(0.01)
        new.hidden = set()
        assert (await turn).sampler == "sampler-new"
    assert policy.refusals(0) == {}


async def test_turns_that_wait_for_a_version_that_no_sampler_proves_any_more_end_the_keeping(
    database: Database, samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_module, "KEEP_S", 0.01)
    old = await samplers.add("old")
    await policy.publish(0, version(0, tmp_path))

    async def never(station: Station, number: int, adapter: Adapter) -> None:
        raise Unproved("k3 of 0.9", sampler=station.sampler.url, figures={"k3": 0.9})

    policy.prover = never
    await replace_sampler(database, samplers, old, "new")
    turn = asyncio.create_task(policy.turn(asks()))
    with pytest.raises(Unproved, match=r"k3 of 0\.9"):
        await asyncio.wait_for(policy.keep(), 20)
    turn.cancel()


async def test_publishing_waits_for_a_sampler_that_is_being_restarted(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    engine = await samplers.add("a")
    await policy.publish(0, version(0, tmp_path))
    engine.dead = True  # its row is still fresh
    publishing = asyncio.create_task(policy.publish(1, version(1, tmp_path)))
    await asyncio.sleep(0.05)
    assert not publishing.done()
    engine.dead = False
    engine.adapters.clear()
    await asyncio.wait_for(publishing, 10)
    assert set(engine.adapters) == {f"{HOLDER}-v0", f"{HOLDER}-v1"}


async def test_publishing_gives_up_after_its_wait(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_module, "PUBLISH_WAIT_S", 0.05)
    with pytest.raises(NoLiveSampler):
        await policy.publish(0, version(0, tmp_path))


async def test_idle_adapters_of_chat_make_room_for_a_run(
    database: Database, samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    engine = await samplers.add("a", slots=2)
    for name in ("chat-x", "chat-y"):
        await engine.load_adapter(name, "/x")
        async with database.begin() as session:
            await repository.add_adapter(session, "sampler-a", name, "/x")
    await policy.publish(0, version(0, tmp_path))
    assert set(engine.adapters) == {"chat-y", f"{HOLDER}-v0"}


async def test_a_retired_version_is_unloaded_and_its_directory_deleted(
    database: Database, samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    engine = await samplers.add("a")
    adapter = version(0, tmp_path)
    await policy.publish(0, adapter)
    await policy.retire(0)
    assert engine.adapters == {}
    assert not Path(adapter.path).exists()
    async with database.read() as session:
        assert await repository.loaded(session, "sampler-a", adapter.name) is None
    await policy.retire(0)  # again is fine


async def test_a_version_that_somebody_else_pins_stays_with_its_directory(
    database: Database, samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    engine = await samplers.add("a")
    adapter = version(0, tmp_path)
    await policy.publish(0, adapter)
    async with database.begin() as session:
        await repository.pin(session, "sampler-a", adapter.name, "chat-1", 60)
    await policy.retire(0)
    assert engine.adapters == {adapter.name: adapter.path}
    assert Path(adapter.path).exists()


async def test_the_directory_outlives_a_sampler_that_does_not_answer(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    engine = await samplers.add("a")
    adapter = version(0, tmp_path)
    await policy.publish(0, adapter)
    engine.dead = True  # perhaps only busy, and still reading
    await policy.retire(0)
    assert Path(adapter.path).exists()


async def test_keeping_survives_the_end_of_a_sampler_and_pins_on_the_next(
    database: Database,
    samplers: FakeSamplers,
    policy: ServedPolicy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(policy_module, "KEEP_S", 0.01)
    monkeypatch.setattr(policy_module, "PIN_S", 0.5)
    old = await samplers.add("old")
    await policy.publish(0, version(0, tmp_path))
    keeping = asyncio.create_task(policy.keep())
    await replace_sampler(database, samplers, old, "new")
    await asyncio.sleep(0.1)
    assert not keeping.done()  # a foreign key broke here
    await policy.turn(asks())
    async with database.begin() as session:
        await repository.unpin(session, f"{HOLDER}-v0", HOLDER)

    async def pinned() -> bool:
        async with database.read() as session:
            return await repository.pinned(session, "sampler-new", f"{HOLDER}-v0")

    async with asyncio.timeout(20):
        while not await pinned():
            await asyncio.sleep(0.01)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


async def test_leftovers_of_earlier_attempts_are_unloaded_and_deleted_and_nobody_elses(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    engine = await samplers.add("a")
    engine.adapters = {"ftjob-1-a1-v3": "/x", "ftjob-1-a1-v4": "/x", "ftjob-12-a1-v3": "/y", "chat": "/z"}
    left = tmp_path / "adapters"
    left.mkdir()
    await policy.clear_leftovers("ftjob-1", left)
    assert set(engine.adapters) == {"ftjob-12-a1-v3", "chat"}
    assert not left.exists()


async def test_scores_come_per_sequence(samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path) -> None:
    with pytest.raises(NoLiveSampler):
        await policy.score("x", [[1, 2]])
    await samplers.add("a")
    await policy.publish(0, version(0, tmp_path))
    assert await policy.score(f"{HOLDER}-v0", [[1, 2, 3], [4, 5]]) == [[-1.0, -1.0], [-1.0]]


async def test_a_long_run_keeps_nothing_of_the_versions_that_left(
    samplers: FakeSamplers, policy: ServedPolicy, tmp_path: Path
) -> None:
    engine = await samplers.add("a")

    async def prove(station: Station, number: int, adapter: Adapter) -> None:
        if number % 2:
            raise Unproved("gate A", sampler=station.sampler.url)

    policy.prover = prove
    for number in range(20):
        with suppress(Unproved):
            await policy.publish(number, version(number, tmp_path))
            await policy.turn(asks(number, request_id=f"r{number}-0"))
        await policy.retire(number)
    kept = (policy._adapters, policy._homes, policy._asking, policy._known, policy._refused, policy._parting._holders)
    assert [len(each) for each in kept] == [0] * len(kept)
    assert engine.adapters == {}
    assert not list(tmp_path.glob(f"{HOLDER}-v*"))
