"""What becomes true in one transaction when a step, a checkpoint or the job is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from app.core.states import RolloutState
from app.db.engine import Database
from app.db.tables import DEFAULT_PROJECT, Checkpoint, Event, File, Job, Rollout, Snapshot
from app.files.storage import Stored
from app.jobs.leases import Fence, LeaseLost
from tests.db.rows import Seed
from workers.registry import Registry, StepRecord


@pytest.fixture
async def fence(seed: Seed) -> Fence:
    job_id = await seed.job(status="running", attempt=2, crashes=2, lease_owner="me", trained_tokens=100)
    return Fence(job_id, 2, DEFAULT_PROJECT)


@pytest.fixture
def registry(database: Database, fence: Fence) -> Registry:
    return Registry(database, fence)


def step(number: int, path: str | None = None, **values: Any) -> StepRecord:
    fields: dict[str, Any] = {"step": number, "snapshot": path or f"s{number}", "snapshot_sha256": "x"}
    return StepRecord(**{**fields, "cursor": {"position": number}, "trained_tokens": 10, "settled": {}, **values})


async def all_of(database: Database, table: Any) -> list[Any]:
    async with database.read() as session:
        return list((await session.scalars(select(table))).all())


async def lose(database: Database) -> None:
    async with database.begin() as session:
        await session.execute(update(Job).values(attempt=3))


async def test_a_step_settles_its_rollouts_and_forgives_earlier_crashes(
    database: Database, registry: Registry, seed: Seed, fence: Fence
) -> None:
    ids = [await seed.rollout(fence.job_id, RolloutState.STARTED) for _ in range(3)]
    settled = {RolloutState.TRAINED: ids[:2], RolloutState.NO_SIGNAL: ids[2:]}
    await registry.step_done(step(1, settled=settled, advantages={ids[0]: 0.5}, events=[("Step 1/2 ", {"step": 1})]))
    (job,) = await all_of(database, Job)
    assert (job.step, job.crashes, job.trained_tokens) == (1, 0, 110)
    rollouts = {row.id: (row.state, row.advantage) for row in await all_of(database, Rollout)}
    assert rollouts == {ids[0]: ("trained", 0.5), ids[1]: ("trained", None), ids[2]: ("no_signal", None)}
    (event,) = await all_of(database, Event)
    assert (event.type, event.message, event.data) == ("metrics", "Step 1/2 ", {"step": 1})
    (snapshot,) = await all_of(database, Snapshot)
    assert (snapshot.step, snapshot.attempt, snapshot.cursor) == (1, 2, {"position": 1})


async def test_the_last_two_snapshots_are_kept_and_the_others_named_for_deletion(
    database: Database, registry: Registry
) -> None:
    assert [await registry.step_done(step(number)) for number in (1, 2, 3, 4)] == [[], [], ["s1"], ["s2"]]
    assert sorted(row.step for row in await all_of(database, Snapshot)) == [3, 4]


async def test_a_snapshot_that_a_kept_row_names_too_is_not_deleted(database: Database, registry: Registry) -> None:
    # A step that trained nothing registers the snapshot of the step before it once more.
    await registry.step_done(step(1, "same"))
    assert [await registry.step_done(step(number, "same")) for number in (2, 3)] == [[], []]
    assert await registry.step_done(step(4, "new")) == []
    assert await registry.step_done(step(5, "newer")) == ["same"]


async def test_without_the_lease_nothing_of_it_is_true(
    database: Database, registry: Registry, seed: Seed, fence: Fence
) -> None:
    id_ = await seed.rollout(fence.job_id, RolloutState.STARTED)
    await lose(database)
    for write in (
        registry.step_done(step(1, settled={RolloutState.TRAINED: [id_]}, events=[("x", {"step": 1})])),
        registry.checkpoint(1, "ft:x", "tiny", Path("p"), "x", {}),
        registry.metrics("x", {"step": 1}),
        registry.failed("x", "y", None, None),
        registry.succeeded("ft:x", "file-r", Stored(1, "x")),
    ):
        with pytest.raises(LeaseLost):
            await write
    assert [row.state for row in await all_of(database, Rollout)] == ["started"]
    for table in (Event, Snapshot, Checkpoint, File):
        assert await all_of(database, table) == []


async def test_a_checkpoint_is_registered_once_a_step_with_its_event(database: Database, registry: Registry) -> None:
    assert not await registry.has_checkpoint(3)
    await registry.checkpoint(3, "ft:tiny:x::1:ckpt-step-3", "tiny", Path("/p"), "abc", {"train_mean_reward": 0.5})
    assert await registry.has_checkpoint(3)
    (event,) = await all_of(database, Event)
    assert event.message == "Checkpoint created at step 3 with Snapshot ID: ft:tiny:x::1:ckpt-step-3"
    with pytest.raises(IntegrityError):
        await registry.checkpoint(3, "another", "tiny", Path("/p"), "abc", {})
    assert len(await all_of(database, Event)) == 1


async def test_the_history_is_the_metrics_oldest_first(registry: Registry) -> None:
    for number in (1, 2, 3):
        await registry.metrics("m", {"step": number})
    assert [data["step"] for data in await registry.metrics_history()] == [1, 2, 3]


async def test_success_comes_with_the_result_file_and_the_last_words(
    database: Database, registry: Registry, seed: Seed, fence: Fence
) -> None:
    open_ = await seed.rollout(fence.job_id, RolloutState.STARTED)
    await registry.succeeded("ft:tiny:x::1", "file-r", Stored(1, "x"))
    (job,) = await all_of(database, Job)
    assert (job.status, job.fine_tuned_model, job.result_files) == ("succeeded", "ft:tiny:x::1", ["file-r"])
    assert [event.message for event in await all_of(database, Event)] == [
        "New fine-tuned model created: ft:tiny:x::1",
        "The job has successfully completed",
    ]
    assert {row.id: row.state for row in await all_of(database, Rollout)} == {open_: "cancelled"}
    (stored,) = await all_of(database, File)
    assert stored.created_at > 1e9
    assert (stored.id, stored.bytes, stored.sha256, stored.status) == ("file-r", 1, "x", "processed")
    assert (stored.purpose, stored.filename, stored.project_id) == (
        "fine-tune-results",
        "step_metrics.csv",
        DEFAULT_PROJECT,
    )


async def test_a_failure_is_on_the_job_and_in_the_last_event(database: Database, registry: Registry) -> None:
    await registry.failed("tool_unreachable", "no answer", "tools.0", {"url": "http://x"})
    (job,) = await all_of(database, Job)
    assert job.status == "failed"
    assert job.error == {"code": "tool_unreachable", "message": "no answer", "param": "tools.0"}
    (event,) = await all_of(database, Event)
    assert (event.level, event.data) == ("error", {"code": "tool_unreachable", "param": "tools.0", "url": "http://x"})
