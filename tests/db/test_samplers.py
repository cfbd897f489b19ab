"""Who is live, who wants one, which adapter makes room: rows, pins and the service over them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import select, update

from app.core.settings import Settings
from app.db.engine import Database, now
from app.db.tables import AdapterPin, Sampler, SamplerAdapter, SamplerWant
from app.samplers import repository
from app.samplers.errors import AdapterNotVisible, SamplerGone
from app.samplers.service import Adapter, NoSampler, seen_path
from tests.db.rows import Seed
from tests.unit.workers.fake_engine import FakeEngine, FakeSamplers

CHAT = "chat-1"


def adapter(name: str) -> Adapter:
    return Adapter(name, f"/adapters/{name}")


@pytest.fixture
async def samplers(database: Database, settings: Settings) -> AsyncIterator[FakeSamplers]:
    made = FakeSamplers(database, settings)
    yield made
    await made.close()


async def use(samplers: FakeSamplers, name: str, holder: str = CHAT) -> str:
    async with samplers.acquire("tiny", adapter(name), holder) as lease:
        return lease.model


async def expire_pins(database: Database, *names: str) -> None:
    """As if so much time had passed; the order of names is the order of their last use."""
    async with database.begin() as session:
        for age, name in enumerate(reversed(names), start=1):
            await session.execute(update(AdapterPin).where(AdapterPin.name == name).values(pinned_until=now() - 1))
            await session.execute(
                update(SamplerAdapter).where(SamplerAdapter.name == name).values(last_used=now() - 100 * age)
            )


async def test_only_samplers_with_a_fresh_heartbeat_are_live_newest_first(
    database: Database, samplers: FakeSamplers
) -> None:
    await samplers.add("old")
    await samplers.add("silent", age_s=repository.LIVE_WITHIN_S + 1)
    await samplers.add("new")
    await samplers.add("other", base_model="another")
    async with database.begin() as session:
        await session.execute(
            update(Sampler).where(Sampler.id == "sampler-old").values(started_at=Sampler.started_at - 5)
        )
    assert [sampler.id for sampler in await samplers.live("tiny")] == ["sampler-new", "sampler-old"]
    async with database.begin() as session:
        await repository.beat(session, "sampler-silent")
    assert len(await samplers.live("tiny", max_age_s=0)) == 3


async def test_a_want_lasts_as_long_as_asked_and_keeps_the_last_error(database: Database) -> None:
    async with database.begin() as session:
        await repository.want(session, "tiny", 60)
        await repository.want(session, "gone", -1)
        await repository.set_want_error(session, "tiny", "no memory")
    async with database.begin() as session:
        assert await repository.wants(session) == ["tiny"]
        await repository.want(session, "gone", 60)
        assert sorted(await repository.wants(session)) == ["gone", "tiny"]
        assert await repository.want_error(session, "tiny") == "no memory"


async def test_wanting_is_written_once_in_a_while(database: Database, samplers: FakeSamplers) -> None:
    await samplers.want("tiny")
    async with database.begin() as session:
        await session.execute(update(SamplerWant).values(wanted_until=1.0))
    await samplers.want("tiny")
    async with database.read() as session:
        assert (await session.scalar(select(SamplerWant.wanted_until))) == 1.0


async def test_a_pin_expires_by_itself_and_is_extended_by_its_holder(
    database: Database, samplers: FakeSamplers
) -> None:
    await samplers.add("a")
    async with database.begin() as session:
        await repository.add_adapter(session, "sampler-a", "x", "/x")
        await repository.pin(session, "sampler-a", "x", "one", -1)
        assert not await repository.pinned(session, "sampler-a", "x")
        await repository.pin(session, "sampler-a", "x", "one", 60)
        await repository.pin(session, "sampler-a", "x", "two", 60)
        await repository.unpin(session, "x", "one")
        assert await repository.pinned(session, "sampler-a", "x")
        await repository.unpin(session, "x", "two")
        assert not await repository.pinned(session, "sampler-a", "x")


async def test_with_its_sampler_go_its_adapters_and_pins(database: Database, samplers: FakeSamplers) -> None:
    await samplers.add("a")
    await use(samplers, "x")
    async with database.begin() as session:
        await repository.remove(session, host="here")
        assert (await session.scalars(select(SamplerAdapter))).all() == []
        assert (await session.scalars(select(AdapterPin))).all() == []


async def test_nothing_can_be_noted_on_a_sampler_that_is_gone(database: Database) -> None:
    async with database.begin() as session:
        with pytest.raises(SamplerGone):
            await repository.pin(session, "sampler-gone", "x", "me", 60)
        with pytest.raises(SamplerGone):
            await repository.add_adapter(session, "sampler-gone", "x", "/x")


async def test_fifty_callers_at_once_load_an_adapter_once(samplers: FakeSamplers) -> None:
    engine = await samplers.add("a")
    assert await asyncio.gather(*(use(samplers, "x") for _ in range(50))) == ["x"] * 50
    assert engine.calls == [("load", "x")]


async def test_the_base_model_needs_no_slot(samplers: FakeSamplers) -> None:
    engine = await samplers.add("a", slots=0)
    async with samplers.acquire("tiny", None, CHAT) as lease:
        assert lease.model == "tiny"
    assert engine.calls == []


async def test_the_least_recently_used_idle_adapter_makes_room(database: Database, samplers: FakeSamplers) -> None:
    engine = await samplers.add("a", slots=3)
    for name in ("x", "y", "z"):
        await use(samplers, name)
    await expire_pins(database, "y", "x")  # y is the older one; z is pinned
    await use(samplers, "new")
    assert engine.calls[-2:] == [("unload", "y"), ("load", "new")]
    assert set(engine.adapters) == {"x", "z", "new"}


async def test_when_every_slot_is_in_use_the_caller_is_told_to_come_back(samplers: FakeSamplers) -> None:
    engine = await samplers.add("a", slots=2)
    async with samplers.acquire("tiny", adapter("x"), CHAT), samplers.acquire("tiny", adapter("y"), CHAT):
        with pytest.raises(NoSampler, match="every adapter slot") as caught:
            await use(samplers, "z")
    assert caught.value.retry_after_s > 0
    assert set(engine.adapters) == {"x", "y"}


async def test_an_adapter_in_use_stays_and_an_idle_one_goes_at_once(samplers: FakeSamplers) -> None:
    engine = await samplers.add("a", slots=2)
    async with samplers.acquire("tiny", adapter("x"), CHAT):
        for name in ("y", "z", "y"):
            await use(samplers, name)
        assert set(engine.adapters) == {"x", "y"}
    await use(samplers, "z")
    assert set(engine.adapters) == {"y", "z"}


async def test_a_pin_of_another_process_is_nobodys_to_give_up(
    database: Database, settings: Settings, samplers: FakeSamplers
) -> None:
    await samplers.add("a", slots=1)
    other = FakeSamplers(database, settings)
    other.engines = samplers.engines
    await use(other, "x", "chat-2")
    await other.close()
    with pytest.raises(NoSampler, match="every adapter slot"):
        await use(samplers, "y")


async def test_an_answer_that_takes_longer_than_a_pin_keeps_its_adapter(
    database: Database, samplers: FakeSamplers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.samplers.service.PIN_S", 0.3)
    await samplers.add("a", slots=1)
    async with samplers.acquire("tiny", adapter("x"), CHAT):
        await asyncio.sleep(0.8)
        async with database.read() as session:
            assert await repository.pinned(session, "sampler-a", "x")
    await asyncio.sleep(0.5)
    async with database.read() as session:
        assert not await repository.pinned(session, "sampler-a", "x")


async def test_slots_that_a_run_reserved_are_left_to_it(database: Database, samplers: FakeSamplers, seed: Seed) -> None:
    engine = await samplers.add("a", slots=3)
    job_id = await seed.job(status="running", attempt=1, reserved_slots=2)
    async with samplers.acquire("tiny", adapter("x"), CHAT):
        with pytest.raises(NoSampler):
            await use(samplers, "y")
    async with database.begin() as session:  # the run fills both; nothing of it may be evicted for chat
        for version in ("v0", "v1"):
            await repository.add_adapter(session, "sampler-a", version, "/v")
            await repository.pin(session, "sampler-a", version, f"{job_id}-a1", 60)
    await expire_pins(database, "x")
    await use(samplers, "y")
    assert engine.calls[-2:] == [("unload", "x"), ("load", "y")]


async def test_an_evicted_adapter_that_the_engine_had_lost_is_no_fault(
    database: Database, samplers: FakeSamplers
) -> None:
    engine = await samplers.add("a", slots=1)
    await use(samplers, "x")
    await expire_pins(database, "x")
    engine.adapters.clear()
    assert await use(samplers, "y") == "y"


async def test_without_a_sampler_the_keepers_reason_is_told(database: Database, samplers: FakeSamplers) -> None:
    with pytest.raises(NoSampler, match="one is starting"):
        await use(samplers, "x")
    async with database.begin() as session:
        await repository.set_want_error(session, "tiny", "out of memory")
    with pytest.raises(NoSampler, match="out of memory"):
        await use(samplers, "x")


async def test_waiting_ends_when_a_sampler_comes_up(samplers: FakeSamplers) -> None:
    async def waiting() -> str:
        async with samplers.acquire("tiny", adapter("x"), CHAT, wait_s=5) as lease:
            return lease.sampler.id

    task = asyncio.create_task(waiting())
    await asyncio.sleep(0.02)
    assert not task.done()
    await samplers.add("a")
    assert await asyncio.wait_for(task, 5) == "sampler-a"


async def test_a_lost_adapter_is_loaded_again(samplers: FakeSamplers) -> None:
    engine = await samplers.add("a")
    await use(samplers, "x")
    engine.adapters.clear()
    (sampler,) = await samplers.live("tiny")
    await samplers.lost_adapter(sampler, "x")
    await use(samplers, "x")
    assert engine.calls == [("load", "x"), ("load", "x")]


async def test_a_replaced_sampler_is_found_though_the_old_one_was_just_seen(
    database: Database, samplers: FakeSamplers
) -> None:
    await samplers.add("a")
    await samplers.live("tiny")  # cached for a second
    async with database.begin() as session:
        await repository.remove(session, sampler_id="sampler-a")
    engine = await samplers.add("b")
    async with samplers.acquire("tiny", adapter("x"), CHAT, wait_s=2) as lease:
        assert lease.sampler.id == "sampler-b"
    assert engine.adapters == {"x": "/adapters/x"}


async def test_an_adapter_that_is_there_already_is_loaded_only_under_the_same_path(samplers: FakeSamplers) -> None:
    engine: FakeEngine = await samplers.add("a")
    engine.adapters = {"x": "/adapters/x", "y": "/elsewhere/y"}
    assert await use(samplers, "x") == "x"
    with pytest.raises(Exception, match="is loaded"):
        await use(samplers, "y")


async def test_a_sampler_that_just_failed_is_avoided_while_there_is_another(samplers: FakeSamplers) -> None:
    await samplers.add("a")
    async with samplers.acquire("tiny", None, CHAT, avoid=frozenset({"sampler-a"})) as lease:
        assert lease.sampler.id == "sampler-a"
    await samplers.add("b")
    samplers.forget(lease.sampler)
    async with samplers.acquire("tiny", None, CHAT, avoid=frozenset({"sampler-a"})) as lease:
        assert lease.sampler.id == "sampler-b"


# --- several samplers -----------------------------------------------------------------------------------------------


async def where(samplers: FakeSamplers, name: str, holder: str = CHAT) -> str:
    async with samplers.acquire("tiny", adapter(name), holder) as lease:
        return lease.sampler.id


async def test_the_sampler_that_holds_the_adapter_is_taken_before_an_empty_one(samplers: FakeSamplers) -> None:
    await samplers.add("a")
    await use(samplers, "x", "somebody")
    newer = await samplers.add("b")  # newest first, without the adapter
    samplers.forget((await samplers.live("tiny", max_age_s=0))[0])
    assert await where(samplers, "x") == "sampler-a"
    assert newer.calls == []


async def test_an_empty_slot_is_taken_before_anything_is_evicted(database: Database, samplers: FakeSamplers) -> None:
    await samplers.add("a", slots=3)
    full = await samplers.add("b", slots=1)
    async with database.begin() as session:
        await repository.add_adapter(session, "sampler-b", "idle", "/idle")
    full.adapters["idle"] = "/idle"
    assert await where(samplers, "x") == "sampler-a"
    assert set(full.adapters) == {"idle"}


async def test_a_sampler_whose_slots_are_all_in_use_is_passed_over(database: Database, samplers: FakeSamplers) -> None:
    await samplers.add("a", slots=1)
    await samplers.add("b", slots=1)
    async with (
        samplers.acquire("tiny", adapter("x"), CHAT) as first,
        samplers.acquire("tiny", adapter("y"), CHAT) as second,
    ):
        assert sorted((first.sampler.id, second.sampler.id)) == ["sampler-a", "sampler-b"]
        with pytest.raises(NoSampler, match="every adapter slot"):
            await where(samplers, "z")
    await expire_pins(database, "x")
    assert await where(samplers, "z") == first.sampler.id  # x is idle and goes


async def test_a_sampler_that_does_not_answer_the_load_is_passed_over(samplers: FakeSamplers) -> None:
    await samplers.add("a")
    dead = await samplers.add("b")
    dead.dead = True
    assert await where(samplers, "x") == "sampler-a"


async def test_requests_to_the_base_model_are_spread(samplers: FakeSamplers) -> None:
    for name in ("a", "b"):
        await samplers.add(name)
    seen = []
    for _ in range(4):
        async with samplers.acquire("tiny", None, CHAT) as lease:
            seen.append(lease.sampler.id)
    assert sorted(seen) == ["sampler-a", "sampler-a", "sampler-b", "sampler-b"]


async def test_a_sampler_elsewhere_gets_the_path_it_sees(samplers: FakeSamplers, settings: Settings) -> None:
    there = await samplers.add("a", root="/mnt/hone")
    path = settings.checkpoints_dir / "ftjob-1" / "step-3"
    for _ in range(2):  # loaded once, then recognised by that same path
        async with samplers.acquire("tiny", Adapter("ft:x", str(path)), CHAT):
            assert there.adapters == {"ft:x": "/mnt/hone/checkpoints/ftjob-1/step-3"}
        await samplers.lost_adapter((await samplers.live("tiny"))[0], "ft:x")


async def test_a_directory_that_the_sampler_does_not_have_is_named_on_both_sides(
    samplers: FakeSamplers, settings: Settings
) -> None:
    there = await samplers.add("a", root="/mnt/hone")
    path = settings.checkpoints_dir / "step-3"
    there.hidden.add("/mnt/hone/checkpoints/step-3")
    with pytest.raises(AdapterNotVisible) as caught:
        async with samplers.acquire("tiny", Adapter("ft:x", str(path)), CHAT):
            pass
    assert "/mnt/hone/checkpoints/step-3" in str(caught.value)
    assert str(path) in str(caught.value)


async def test_a_sampler_with_another_directory_is_passed_over_and_a_reason_that_may_pass_is_told_first(
    samplers: FakeSamplers,
) -> None:
    await samplers.add("a", slots=1)
    blind = await samplers.add("b", slots=1)
    for name in ("x", "y"):
        blind.hidden.add(adapter(name).path)
    async with samplers.acquire("tiny", adapter("x"), CHAT) as lease:
        assert lease.sampler.id == "sampler-a"
        with pytest.raises(NoSampler, match="every adapter slot"):
            await where(samplers, "y")
    assert await where(samplers, "y") == "sampler-a"


@pytest.mark.parametrize(
    ("path", "theirs", "seen"),
    [
        ("/data/adapters/v1", "", "/data/adapters/v1"),
        ("/data/adapters/v1", "/data", "/data/adapters/v1"),
        ("/data/adapters/v1", "/mnt", "/mnt/adapters/v1"),
        ("/elsewhere/v1", "/mnt", "/elsewhere/v1"),
        ("/database/v1", "/mnt", "/database/v1"),
    ],
)
def test_only_paths_below_our_directory_are_mapped(path: str, theirs: str, seen: str) -> None:
    assert seen_path(path, Path("/data"), theirs) == seen
