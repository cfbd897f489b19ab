"""Many workers at once: each job goes to one, and no sampler's slots are promised twice. Does not cover: leases."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from sqlalchemy import func, select

from app.db.engine import Database
from app.db.tables import Event, Job
from app.jobs import leases
from tests.db.rows import Seed


async def work(database: Database, jobs: Sequence[str], owner: str, slots: int) -> list[str]:
    """Try every job once, in an order of one's own; the ids of those that were won."""
    mine = []
    for job_id in random.Random(owner).sample(jobs, len(jobs)):
        async with database.begin() as session:
            if await leases.claim(session, job_id, owner=owner, lease_s=60, adapter_slots=slots) is not None:
                mine.append(job_id)
    return mine


async def test_twenty_workers_over_ten_jobs_start_each_job_once(database: Database, seed: Seed) -> None:
    jobs = [await seed.job(status="queued", plan={"max_staleness": 0}) for _ in range(10)]
    won = await asyncio.gather(*(work(database, jobs, f"worker-{n}", slots=100) for n in range(20)))
    assert Counter(job_id for mine in won for job_id in mine) == Counter(jobs)
    async with database.read() as session:
        assert set(await session.scalars(select(Job.attempt))) == {1}
        started = select(func.count()).where(Event.message == "Fine-tuning job started")
        assert await session.scalar(started) == 10


async def test_workers_at_once_never_reserve_more_slots_than_there_are(database: Database, seed: Seed) -> None:
    jobs = [await seed.job(status="queued", plan={"max_staleness": 0}) for _ in range(10)]
    won = await asyncio.gather(*(work(database, jobs, f"worker-{n}", slots=8) for n in range(10)))
    assert sum(len(mine) for mine in won) == 3  # 2 slots each; of 8, one is chat's
    async with database.read() as session:
        assert await session.scalar(select(func.sum(Job.reserved_slots))) == 6


async def test_a_claim_does_not_wait_for_one_that_is_under_way(database: Database, seed: Seed) -> None:
    if database.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    job_id, other = [await seed.job(status="queued", plan={}, model=model) for model in ("tiny", "another")]
    async with database.begin() as session, asyncio.timeout(5):
        assert await leases.claim(session, job_id, owner="slow", lease_s=60, adapter_slots=8) is not None
        assert await work(database, [job_id, other], "quick", slots=8) == [other]
