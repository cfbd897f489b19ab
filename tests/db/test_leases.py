"""Who owns a job: claims, fences, expired leases, slots; every lease is measured by the database's clock."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from sqlalchemy import select, update

from app.core.states import JobStatus, RolloutState
from app.db.engine import Database, create_sync, now
from app.db.tables import DEFAULT_PROJECT, Event, Job, Rollout, Snapshot
from app.jobs import leases, reconcile
from app.jobs.leases import Claim, Fence, LeaseLost
from app.jobs.state import IllegalTransition
from tests.db.rows import Seed

LEASE_S = 60.0
PLAN = {"max_staleness": 0, "total_steps": 5}


async def claim(database: Database, job_id: str, owner: str = "one", lease_s: float = LEASE_S) -> Claim | None:
    async with database.begin() as session:
        return await leases.claim(session, job_id, owner=owner, lease_s=lease_s, adapter_slots=8)


async def won(database: Database, job_id: str, **values: Any) -> Claim:
    found = await claim(database, job_id, **values)
    assert found is not None
    return found


async def job(database: Database, job_id: str) -> Job:
    async with database.read() as session:
        found = await session.get(Job, job_id)
        assert found is not None
        return found


async def messages(database: Database) -> list[tuple[str, str]]:
    async with database.read() as session:
        return [(e.level, e.message) for e in (await session.scalars(select(Event).order_by(Event.seq))).all()]


async def expire(database: Database, job_id: str) -> None:
    async with database.begin() as session:
        await session.execute(update(Job).where(Job.id == job_id).values(lease_until=now() - 1))


async def take_back(database: Database, max_crashes: int = 3) -> list[str]:
    async with database.begin() as session:
        return await reconcile.take_back_expired(session, max_crashes)


@pytest.fixture
async def queued(seed: Seed) -> str:
    return await seed.job(status="queued", plan=PLAN)


async def test_one_of_twenty_claims_at_once_wins(database: Database, queued: str) -> None:
    found = await asyncio.gather(*(claim(database, queued, f"worker-{n}") for n in range(20)))
    (winner,) = [one for one in found if one is not None]
    row = await job(database, queued)
    assert (row.status, row.attempt, row.reserved_slots) == ("running", 1, 2)
    assert (winner.fence.attempt, winner.fence.project_id) == (1, DEFAULT_PROJECT)
    assert await messages(database) == [("info", "Fine-tuning job started")]


@pytest.mark.parametrize("status", [s for s in JobStatus if s is not JobStatus.QUEUED])
async def test_only_a_queued_job_can_be_claimed(database: Database, seed: Seed, status: JobStatus) -> None:
    assert await claim(database, await seed.job(status=status, plan=PLAN)) is None


async def test_a_lease_is_as_long_as_asked_by_the_databases_clock(database: Database, queued: str) -> None:
    await won(database, queued, lease_s=90.0)
    async with database.read() as session:
        left = await session.scalar(select(Job.lease_until - now()))
        assert abs((await session.scalar(select(now())) or 0) - time.time()) < 2
    assert left == pytest.approx(90.0, abs=5)


async def test_a_clock_of_a_worker_that_is_wrong_changes_nothing(
    database: Database, queued: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 9e9)
    await won(database, queued)
    assert await take_back(database) == []
    async with database.read() as session:
        assert await session.scalar(select(Job.lease_until - now())) == pytest.approx(LEASE_S, abs=5)


async def test_every_claim_raises_the_attempt_and_keeps_the_first_start(database: Database, queued: str) -> None:
    first = await won(database, queued)
    started = (await job(database, queued)).started_at
    async with database.begin() as session:
        await leases.release(session, first.fence, reason="The worker was asked to stop")
    second = await won(database, queued)
    assert (first.fence.attempt, second.fence.attempt) == (1, 2)
    assert (await job(database, queued)).started_at == started
    assert [text for _, text in await messages(database)] == [
        "Fine-tuning job started",
        "The worker was asked to stop; the job is queued again",
        "Fine-tuning job resumed from step 0",
    ]


async def test_nothing_of_an_old_attempt_is_written(database: Database, queued: str) -> None:
    old = await won(database, queued)
    await expire(database, queued)
    await take_back(database)
    new = await won(database, queued)
    before = await job(database, queued)
    for write in (
        lambda session: leases.fenced(session, old.fence, step=9),
        lambda session: leases.release(session, old.fence, reason="x"),
        lambda session: leases.pause(session, old.fence, reason="x"),
        lambda session: leases.finish(session, old.fence, JobStatus.SUCCEEDED),
        lambda session: leases.finish(session, old.fence, JobStatus.FAILED, error={"code": "x"}),
    ):
        with pytest.raises(LeaseLost):
            async with database.begin() as session:
                await write(session)
    after = await job(database, queued)
    assert (
        (after.status, after.attempt, after.step)
        == ("running", new.fence.attempt, 0)
        == (
            before.status,
            before.attempt,
            before.step,
        )
    )


async def test_a_fence_that_fails_undoes_the_whole_transaction(database: Database, queued: str) -> None:
    old = await won(database, queued)
    await expire(database, queued)
    await take_back(database)

    async def write() -> None:
        async with database.begin() as session:
            await session.execute(update(Job).values(step=9))
            await leases.fenced(session, old.fence)

    with pytest.raises(LeaseLost):
        await write()
    assert (await job(database, queued)).step == 0


async def test_renewing_moves_the_lease_until_another_attempt_owns_it(database: Database, queued: str) -> None:
    claimed = await won(database, queued, lease_s=1.0)
    engine = create_sync(database.url)
    assert await asyncio.to_thread(leases.renew, engine, claimed.fence, 500.0)
    async with database.read() as session:
        assert (await session.scalar(select(Job.lease_until - now())) or 0) > 400
    assert not await asyncio.to_thread(leases.renew, engine, Fence(queued, 2, DEFAULT_PROJECT), 500.0)
    async with database.begin() as session:
        await leases.finish(session, claimed.fence, JobStatus.SUCCEEDED)
    assert not await asyncio.to_thread(leases.renew, engine, claimed.fence, 500.0)
    engine.dispose()


async def test_the_lease_of_a_process_known_to_be_dead_ends_at_once_and_no_other(
    database: Database, queued: str
) -> None:
    await won(database, queued, owner=leases.owner_name("host", 7))
    async with database.begin() as session:
        await leases.expire(session, queued, leases.owner_name("host", 8))
    assert await take_back(database) == []
    async with database.begin() as session:
        await leases.expire(session, queued, leases.owner_name("host", 7))
    assert await take_back(database) == [queued]


async def test_an_expired_lease_goes_back_to_the_queue_with_a_crash_counted(database: Database, queued: str) -> None:
    await won(database, queued)
    assert await take_back(database) == []  # the lease still holds
    await expire(database, queued)
    assert await take_back(database) == [queued]
    row = await job(database, queued)
    assert (row.status, row.crashes, row.lease_owner, row.reserved_slots, row.attempt) == ("queued", 1, None, 0, 1)
    assert (await messages(database))[-1][0] == "warn"
    assert await take_back(database) == []


async def test_the_third_crash_without_a_step_in_between_fails_the_job_and_closes_its_rollouts(
    database: Database, queued: str, seed: Seed
) -> None:
    for _ in range(2):
        await won(database, queued)
        await expire(database, queued)
        assert await take_back(database) == [queued]
    claimed = await won(database, queued)
    open_ = await seed.rollout(queued, RolloutState.STARTED, attempt=claimed.fence.attempt)
    await expire(database, queued)
    assert await take_back(database) == []
    row = await job(database, queued)
    assert (row.status, row.crashes, row.attempt) == ("failed", 3, 3)
    assert (row.error or {})["code"] == "worker_lost"
    assert row.finished_at is not None
    async with database.read() as session:
        assert await session.scalar(select(Rollout.state).where(Rollout.id == open_)) == "cancelled"
    assert (await messages(database))[-1][0] == "error"


async def test_two_reconcilers_at_once_count_one_crash(database: Database, queued: str) -> None:
    await won(database, queued)
    await expire(database, queued)
    taken = await asyncio.gather(*(take_back(database) for _ in range(5)))
    assert sorted(taken) == [[], [], [], [], [queued]]
    assert (await job(database, queued)).crashes == 1


async def test_a_release_sets_the_crash_count_only_when_it_is_a_crash(database: Database, queued: str) -> None:
    claimed = await won(database, queued)
    async with database.begin() as session:
        await leases.release(session, claimed.fence, reason="crashed", crashes=2)
    assert (await job(database, queued)).crashes == 2
    again = await won(database, queued)
    async with database.begin() as session:
        assert await leases.crash_count(session, again.fence) == 2
        await leases.release(session, again.fence, reason="stopped")
    row = await job(database, queued)
    assert (row.status, row.crashes, row.activity, row.lease_until) == ("queued", 2, None, None)


async def test_a_job_without_free_adapter_slots_waits_with_a_reason_and_goes_later(
    database: Database, seed: Seed
) -> None:
    jobs = [await seed.job(status="queued", plan=PLAN) for _ in range(4)]
    other = await seed.job(status="queued", plan=PLAN, model="another")
    claimed = [await won(database, job_id) for job_id in jobs[:3]]  # 3 × 2 of 8, one is for chat
    assert await claim(database, jobs[3]) is None
    row = await job(database, jobs[3])
    assert (row.status, row.attempt) == ("queued", 0)
    assert row.queue_reason == "waits for adapter slots: 2 needed, 1 of 7 free"
    await won(database, other)  # another model has a sampler of its own
    async with database.begin() as session:
        await leases.finish(session, claimed[0].fence, JobStatus.SUCCEEDED)
    await won(database, jobs[3])
    assert (await job(database, jobs[3])).queue_reason is None


async def test_staleness_needs_a_slot_for_each_version(database: Database, seed: Seed) -> None:
    job_id = await seed.job(status="queued", plan={**PLAN, "max_staleness": 3})
    await won(database, job_id)
    assert (await job(database, job_id)).reserved_slots == 5


async def test_a_claim_resumes_from_the_newest_snapshot_of_any_attempt(database: Database, queued: str) -> None:
    async with database.begin() as session:
        for step, attempt in ((3, 1), (4, 1), (4, 2), (2, 3)):
            session.add(
                Snapshot(
                    project_id=DEFAULT_PROJECT,
                    job_id=queued,
                    step=step,
                    attempt=attempt,
                    path=f"{step}-{attempt}",
                    sha256="x",
                    cursor={"position": 12},
                    created_at=now(),
                )
            )
    claimed = await won(database, queued)
    assert claimed.snapshot is not None
    assert (claimed.snapshot.path, claimed.snapshot.cursor) == ("4-2", {"position": 12})


async def test_the_oldest_jobs_come_first(database: Database, seed: Seed) -> None:
    jobs = [await seed.job(status="queued", created_at=float(at)) for at in (30, 10, 20)]
    await seed.job(status="running", created_at=1.0)
    async with database.read() as session:
        assert [job.id for job in await leases.waiting(session)] == [jobs[1], jobs[2], jobs[0]]
        assert [job.id for job in await leases.waiting(session, limit=1)] == [jobs[1]]


async def test_an_end_frees_the_slots_and_closes_open_rollouts(database: Database, queued: str, seed: Seed) -> None:
    claimed = await won(database, queued)
    open_, done = await seed.rollout(queued, RolloutState.STARTED), await seed.rollout(queued)
    async with database.begin() as session:
        await leases.finish(session, claimed.fence, JobStatus.FAILED, error={"code": "x", "message": "y"})
    row = await job(database, queued)
    assert (row.status, row.reserved_slots, row.lease_owner) == ("failed", 0, None)
    async with database.read() as session:
        states = {row.id: row.state for row in (await session.execute(select(Rollout.id, Rollout.state))).all()}
    assert states == {open_: "cancelled", done: "trained"}


async def test_a_worker_that_pauses_says_why_frees_its_slots_and_closes_the_ledger(
    database: Database, queued: str, seed: Seed
) -> None:
    claimed = await won(database, queued)
    open_, done = await seed.rollout(queued, RolloutState.STARTED), await seed.rollout(queued)
    async with database.begin() as session:
        await leases.fenced(session, claimed.fence, step=3)
        await leases.pause(session, claimed.fence, reason="Policy 4 was not proved", data={"gap": 0.5})
    row = await job(database, queued)
    assert (row.status, row.reserved_slots, row.lease_owner, row.lease_until) == ("paused", 0, None, None)
    assert (row.activity, row.finished_at) == ("paused: Policy 4 was not proved", None)
    async with database.read() as session:
        states = {row.id: row.state for row in (await session.execute(select(Rollout.id, Rollout.state))).all()}
        last = (await session.scalars(select(Event).order_by(Event.seq.desc()).limit(1))).one()
    assert states == {open_: "cancelled", done: "trained"}
    assert (last.level, last.message, last.data) == (
        "error",
        "Fine-tuning job paused after step 3: Policy 4 was not proved",
        {"step": 3, "gap": 0.5},
    )


async def test_after_a_pause_the_worker_can_neither_renew_nor_write(database: Database, queued: str) -> None:
    claimed = await won(database, queued)
    async with database.begin() as session:
        await leases.pause(session, claimed.fence, reason="x")
    engine = create_sync(database.url)
    assert not leases.renew(engine, claimed.fence, LEASE_S)
    engine.dispose()
    for _ in range(2):
        with pytest.raises(LeaseLost):
            async with database.begin() as session:
                await leases.pause(session, claimed.fence, reason="x")
    assert await take_back(database) == []
    assert await claim(database, queued) is None


async def test_a_worker_cannot_end_a_job_in_a_status_that_is_a_clients(database: Database, queued: str) -> None:
    claimed = await won(database, queued)
    async with database.begin() as session:
        with pytest.raises(IllegalTransition):
            await leases.finish(session, claimed.fence, JobStatus.CANCELLED)


async def test_files_are_read_by_one_reader_at_a_time(database: Database, seed: Seed) -> None:
    job_id = await seed.job()

    async def read(owner: str) -> Job | None:
        async with database.begin() as session:
            return await leases.claim_validation(session, job_id, owner)

    found = await asyncio.gather(*(read(f"runner-{n}") for n in range(5)))
    assert sum(one is not None for one in found) == 1
    async with database.read() as session:
        assert list(await leases.unvalidated(session)) == []
    await expire(database, job_id)
    async with database.read() as session:
        assert list(await leases.unvalidated(session)) == [job_id]
    assert await read("late") is not None


async def test_a_reader_that_lost_its_turn_or_was_cancelled_changes_nothing(database: Database, seed: Seed) -> None:
    job_id = await seed.job()
    for owner in ("first", "second"):
        async with database.begin() as session:
            assert await leases.claim_validation(session, job_id, owner) is not None
        if owner == "first":
            await expire(database, job_id)
    async with database.begin() as session:
        assert not await leases.finish_validation(session, job_id, "first", error={"code": "x"})
        assert await leases.finish_validation(session, job_id, "second", plan=PLAN)
        assert not await leases.finish_validation(session, job_id, "second", plan=PLAN)
    row = await job(database, job_id)
    assert (row.status, row.total_steps, row.lease_owner) == ("queued", 5, None)


async def test_a_fault_in_the_files_fails_the_job_before_any_worker(database: Database, seed: Seed) -> None:
    job_id = await seed.job()
    async with database.begin() as session:
        await leases.claim_validation(session, job_id, "me")
        assert await leases.finish_validation(session, job_id, "me", error={"code": "bad_row"})
    row = await job(database, job_id)
    assert (row.status, row.attempt, row.error) == ("failed", 0, {"code": "bad_row"})
    assert row.finished_at is not None
