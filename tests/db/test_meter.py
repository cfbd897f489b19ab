"""GPU hours are counted over all attempts, whoever ends one, and a resume grants a spent budget again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import select, update

from app.core.states import JobStatus
from app.db.engine import Database, now
from app.db.tables import DEFAULT_PROJECT, Job
from app.jobs import leases, meter, reconcile, repository, service
from app.jobs.leases import Claim
from tests.db.rows import Seed
from workers.budget import Budget, BudgetSpent

HOUR = meter.HOUR_S
Ends = Callable[[Any, Claim], Awaitable[object]]


async def attempt(database: Database, job_id: str, *, hours: float, gpus: int = 1) -> Claim:
    """Claimed so long ago."""
    async with database.begin() as session:
        claim = await leases.claim(session, job_id, owner="me", lease_s=60, adapter_slots=8)
    assert claim is not None
    await Budget(database, claim.fence).holds(gpus)
    async with database.begin() as session:
        await session.execute(update(Job).values(running_since=now() - hours * HOUR))
    return claim


async def job(database: Database) -> tuple[Job, float]:
    async with database.read() as session:
        row, at = (await session.execute(select(Job, now()))).one()
        return row, float(at)


ENDS: dict[str, Ends] = {
    "put back": lambda session, claim: leases.release(session, claim.fence, reason="x"),
    "paused by itself": lambda session, claim: leases.pause(session, claim.fence, reason="x"),
    "paused by a client": lambda session, claim: service.pause(session, DEFAULT_PROJECT, claim.job.id),
    "cancelled": lambda session, claim: service.cancel(session, DEFAULT_PROJECT, claim.job.id),
    "failed": lambda session, claim: leases.finish(session, claim.fence, JobStatus.FAILED),
}


@pytest.mark.parametrize("end", ENDS)
async def test_whoever_ends_a_run_its_hours_times_its_gpus_are_kept(database: Database, seed: Seed, end: str) -> None:
    claim = await attempt(database, await seed.job(status="queued"), hours=1.5, gpus=4)
    row, at = await job(database)
    assert meter.spent_s(row, at) == pytest.approx(6 * HOUR, abs=20)
    async with database.begin() as session:
        await ENDS[end](session, claim)
    row, at = await job(database)
    assert row.running_since is None
    assert meter.spent_s(row, at) == row.gpu_seconds == pytest.approx(6 * HOUR, abs=20)
    assert meter.spent_s(row, at + HOUR) == row.gpu_seconds  # a wait counts nothing


async def test_a_worker_that_died_counts_until_its_lease_ran_out(database: Database, seed: Seed) -> None:
    await attempt(database, await seed.job(status="queued"), hours=3, gpus=2)
    async with database.begin() as session:
        await session.execute(update(Job).values(lease_until=now() - HOUR))  # the whole service was away for an hour
    row, at = await job(database)
    assert meter.spent_s(row, at) == pytest.approx(4 * HOUR, abs=20)
    async with database.begin() as session:
        await reconcile.take_back_expired(session, max_crashes=3)
    assert (await job(database))[0].gpu_seconds == pytest.approx(4 * HOUR, abs=20)


async def test_a_supervisor_known_to_be_dead_counts_until_then(database: Database, seed: Seed) -> None:
    claim = await attempt(database, await seed.job(status="queued"), hours=1)
    async with database.begin() as session:
        await leases.expire(session, claim.job.id, "me")
    async with database.begin() as session:
        assert await reconcile.take_back_expired(session, max_crashes=3) == [claim.job.id]
    assert (await job(database))[0].gpu_seconds == pytest.approx(HOUR, abs=20)


async def test_attempts_add_up_each_with_its_own_gpus(database: Database, seed: Seed) -> None:
    job_id = await seed.job(status="queued")
    for hours, gpus in ((1.0, 1), (0.5, 4), (2.0, 0)):  # 0: a host without GPUs counts as one
        claim = await attempt(database, job_id, hours=hours, gpus=gpus)
        async with database.begin() as session:
            await leases.release(session, claim.fence, reason="x")
    assert (await job(database))[0].gpu_seconds == pytest.approx(5 * HOUR, abs=30)


async def test_a_spent_budget_is_told_with_its_numbers_and_an_unspent_one_is_not(
    database: Database, seed: Seed
) -> None:
    claim = await attempt(database, await seed.job(status="queued", options={"max_gpu_hours": 2.0}), hours=1.9)
    budget = Budget(database, claim.fence)
    await budget.check()
    await budget.holds(2)
    with pytest.raises(
        BudgetSpent, match=r"3\.8 GPU hours are spent, the budget is 2 \(hone.max_gpu_hours\)"
    ) as caught:
        await budget.check()
    assert caught.value.data == {"gpu_hours": pytest.approx(3.8, abs=0.01), "max_gpu_hours": 2.0, "gpus": 2}


async def test_without_a_budget_nothing_is_ever_spent(database: Database, seed: Seed) -> None:
    claim = await attempt(database, await seed.job(status="queued"), hours=1e6)
    await Budget(database, claim.fence).check()


@pytest.mark.parametrize(("hours", "limit"), [(2.5, 4.5), (1.0, 2.0)])
async def test_a_resume_grants_as_much_again_only_where_it_was_spent(
    database: Database, seed: Seed, hours: float, limit: float
) -> None:
    job_id = await seed.job(status="queued", options={"max_gpu_hours": 2.0})
    claim = await attempt(database, job_id, hours=hours)
    async with database.begin() as session:
        await leases.pause(session, claim.fence, reason="x")
        await service.resume(session, DEFAULT_PROJECT, job_id)
    row, _ = await job(database)
    assert row.status == "queued"
    assert (meter.limit_s(row) or 0.0) / HOUR == pytest.approx(limit, abs=0.01)
    async with database.read() as session:
        (last, *_) = await repository.list_events(session, job_id, after=None, limit=1, ascending=False)
    assert ("raised to 4.5 GPU hours, 2.5 are spent" in last.message) == (hours > 2)
