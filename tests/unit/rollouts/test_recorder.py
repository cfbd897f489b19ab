"""What a run writes while it samples: ledger rows, traces, activity, events; all of it fenced."""

from __future__ import annotations

import asyncio
from array import array
from typing import Any

import pytest
from sqlalchemy import select, update

from app.core.settings import Settings
from app.core.states import RolloutState
from app.db.engine import Database
from app.db.tables import DEFAULT_PROJECT, Event, Job, Rollout
from app.graders.base import Grade
from app.jobs.leases import Fence, LeaseLost
from app.rollouts import ledger
from app.rollouts.traces import Traces
from tests.db.rows import Seed
from tests.unit.rollouts.scripted import answered, ended, key, row
from workers.rollouts import recorder as recording
from workers.rollouts.recorder import Recorder
from workers.rollouts.types import Ended, StopReason, ToolRecord


@pytest.fixture
async def job(seed: Seed) -> str:
    return await seed.job(status="running", attempt=2, lease_owner="me", lease_until=9e9)


@pytest.fixture
def recorder(database: Database, settings: Settings, job: str) -> Recorder:
    return Recorder(database, Fence(job, 2, DEFAULT_PROJECT), settings.traces_dir, {"sampling": 1.25})


async def rows(database: Database) -> dict[str, Rollout]:
    async with database.read() as session:
        return {found.id: found for found in (await session.scalars(select(Rollout))).all()}


async def job_row(database: Database, job_id: str) -> Job:
    async with database.read() as session:
        found = await session.get(Job, job_id)
        assert found is not None
        return found


def stored(settings: Settings, found: Rollout) -> dict[str, Any]:
    return Traces(settings.traces_dir).read(str(found.trace_file), found.trace_offset or 0, found.trace_length or 0)


async def lose(database: Database) -> None:
    async with database.begin() as session:
        await session.execute(update(Job).values(attempt=3))


def tool(**values: Any) -> ToolRecord:
    fields = {"call_id": "call_1", "name": "lookup", "arguments": "{}", "output": "31", "status": 200}
    return ToolRecord(**{**fields, "attempts": 1, "seconds": 0.5, "is_error": False, **values})


async def write(recorder: Recorder, *finished: Ended) -> None:
    await recorder.start([one.key for one in finished])
    for one in finished:
        recorder.ended(one, row(one.key.row))
    await recorder.flush()


async def test_a_rollout_is_in_the_ledger_before_it_asks_anybody(database: Database, recorder: Recorder) -> None:
    await recorder.start([key(id="t1", row=4, group=9, sample=2, version=7, greedy=True, split="valid", step=3)])
    found = (await rows(database))["t1"]
    assert (found.state, found.attempt, found.finished_at, found.turns) == ("started", 2, None, 0)
    assert (found.row, found.group, found.sample, found.version, found.greedy) == (4, 9, 2, 7, True)


async def test_a_trace_is_read_back_at_its_place_whole(
    database: Database, settings: Settings, recorder: Recorder
) -> None:
    long = ended(0.5, sample=1, tokens=300)
    long.trajectory.messages = [{"role": "assistant", "content": "größe 🧢"}]
    long.trajectory.tools = [tool()]
    await write(recorder, ended(1.0, sample=0), long)
    await write(recorder, ended(0.0, sample=2))
    for sample, tokens in ((0, 3), (1, 301), (2, 3)):
        found = (await rows(database))[f"g1s{sample}"]
        trace = stored(settings, found)
        assert trace["id"] == found.id
        assert len(trace["tokens"]["ids"]) == len(trace["tokens"]["log_probs"]) == tokens
        assert trace["tokens"]["mask"][:2] == [0, 1]
        assert trace["messages"][0]["content"] == "row 0"
        assert trace["grade"]["score"] == found.reward
    found = (await rows(database))["g1s1"]
    trace = stored(settings, found)
    assert trace["messages"][1]["content"] == "größe 🧢"
    assert trace["tool_calls"][0]["output"] == "31"


async def test_a_trace_says_which_version_served_each_sampled_token(
    database: Database, settings: Settings, recorder: Recorder
) -> None:
    split = ended(1.0, tokens=2)
    split.trajectory.tree.restart(array("i", [8, 9]))
    answered(split.trajectory, [], [5])
    await write(recorder, split)
    trace = stored(settings, (await rows(database))["g1s0"])
    assert trace["tokens"]["ids"] == [1, 1, 1, 8, 9, 5]
    assert trace["tokens"]["mask"] == [0, 1, 1, 0, 0, 1]
    assert trace["segments"] == [{"start": 0, "end": 3, "parent": None}, {"start": 3, "end": 6, "parent": None}]
    served = [(turn["segment"], turn["start"], turn["end"], turn["version"]) for turn in trace["turns"]]
    assert served == [(0, 1, 3, 3), (1, 2, 3, 3)]


async def test_outcomes_of_all_kinds_are_written_in_one_flush(database: Database, recorder: Recorder) -> None:
    failed = ended(None, sample=1, state=RolloutState.TOOL_FAILED, error="tool 'x' failed")
    graded = ended(1.0, sample=0, trajectory={"stop_reason": StopReason.MAX_STEPS, "tools": [tool()]})
    valid = ended(0.25, sample=2, key={"split": "valid"})
    nested = Ended(key(id="n"), valid.trajectory, Grade(0.5, {"exact": 1.0, "style": 0.0}), None)
    await write(recorder, failed, graded, valid, nested)
    found = await rows(database)
    assert (found["g1s1"].state, found["g1s1"].error, found["g1s1"].reward) == ("tool_failed", "tool 'x' failed", None)
    assert (found["g1s0"].state, found["g1s0"].reward, found["g1s0"].error) == ("started", 1.0, None)
    assert (found["g1s0"].stop_reason, found["g1s0"].truncated, found["g1s0"].tool_calls) == ("max_steps", True, 1)
    assert (found["g1s2"].state, found["g1s2"].reward, found["g1s2"].stop_reason) == ("evaluated", 0.25, None)
    assert (found["n"].sub_scores, found["g1s1"].sub_scores) == ({"exact": 1.0, "style": 0.0}, None)
    assert all(one.finished_at is not None and one.completion_tokens == 2 for one in found.values())


async def test_an_outcome_that_comes_after_the_end_changes_nothing(
    database: Database, recorder: Recorder, job: str
) -> None:
    await recorder.start([key(id="g1s0")])
    async with database.begin() as session:
        await ledger.settle(session, ["g1s0"], RolloutState.CANCELLED)
    recorder.ended(ended(1.0), row())
    await recorder.flush()
    found = (await rows(database))["g1s0"]
    assert (found.state, found.reward) == ("cancelled", None)


async def test_the_age_of_an_activity_counts_from_its_first_words(
    database: Database, recorder: Recorder, job: str
) -> None:
    async def shown() -> tuple[str | None, float | None]:
        await recorder.flush()
        found = await job_row(database, job)
        return found.activity, found.activity_at

    recorder.activity("reading")
    first = await shown()
    recorder.activity("reading")
    await asyncio.sleep(0.01)
    assert await shown() == first
    recorder.activity("sampling")
    second = await shown()
    assert second[0] == "sampling"
    assert (second[1] or 0) > (first[1] or 0)


async def test_the_seconds_of_all_phases_are_stored(database: Database, recorder: Recorder, job: str) -> None:
    recorder.seconds["tools"] = 2.00049
    await recorder.flush()
    assert (await job_row(database, job)).seconds == {"sampling": 1.25, "tools": 2.0}


async def test_running_asks_what_to_say_flushes_and_tells_the_heartbeat(
    database: Database, recorder: Recorder, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "FLUSH_S", 0.01)
    moved = asyncio.Event()
    recorder.describe, recorder.on_flush = lambda: "step 1: sampling", moved.set
    running = asyncio.create_task(recorder.run())
    await asyncio.wait_for(moved.wait(), 5)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert (await job_row(database, job)).activity == "step 1: sampling"


async def test_a_lost_lease_ends_the_loop(
    database: Database, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "FLUSH_S", 0.01)
    running = asyncio.create_task(recorder.run())
    await lose(database)
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(running, 5)


async def test_without_the_lease_nothing_is_written(database: Database, recorder: Recorder) -> None:
    await recorder.start([key(id="g1s0")])
    await lose(database)
    recorder.ended(ended(1.0), row())
    for write_attempt in (recorder.start([key(id="t2")]), recorder.flush(), recorder.event("hello")):
        with pytest.raises(LeaseLost):
            await write_attempt
    found = await rows(database)
    assert found.keys() == {"g1s0"}
    assert found["g1s0"].reward is None
    async with database.read() as session:
        assert (await session.scalars(select(Event))).all() == []


async def test_two_flushes_at_once_write_every_rollout_once(database: Database, recorder: Recorder) -> None:
    finished = [ended(1.0, sample=number) for number in range(50)]
    await recorder.start([one.key for one in finished])
    for one in finished:
        recorder.ended(one, row())
    await asyncio.gather(*(recorder.flush() for _ in range(4)))
    found = (await rows(database)).values()
    assert [one.reward for one in found] == [1.0] * 50
    assert len({one.trace_offset for one in found}) == 50
