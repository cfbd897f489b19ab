"""Jobs in the database: lists, filters, cancel, idempotency, and what a project may not see. Does not cover: HTTP."""

from __future__ import annotations

import asyncio

import pytest

from app.core.errors import InvalidRequest, NotFound
from app.core.states import RolloutState
from app.db.engine import Database, now
from app.db.tables import DEFAULT_PROJECT
from app.jobs import events, idempotency, leases, service
from app.jobs.idempotency import Attempt
from tests.db.rows import Seed


async def ids(database: Database, project_id: str = DEFAULT_PROJECT, **asked: object) -> list[str]:
    query = {"after": None, "limit": 20, "metadata": None, **asked}
    async with database.read() as session:
        page = await service.list_jobs(session, project_id, **query)  # type: ignore[arg-type]
    return [view.job.id for view in page.items]


async def test_jobs_are_listed_newest_first_and_paged_without_gaps(database: Database, seed: Seed) -> None:
    made = [await seed.job(created_at=float(stamp)) for stamp in (1, 2, 2, 2, 3)]
    assert (await ids(database))[0] == made[-1]
    seen: list[str] = []
    while page := await ids(database, limit=1, after=seen[-1] if seen else None):
        seen += page
    assert sorted(seen) == sorted(made)
    assert seen == await ids(database)


async def test_metadata_filters_any_key_and_none_at_all(database: Database, seed: Seed) -> None:
    odd = 'a"b.$[0]\\'
    both = await seed.job(user_metadata={odd: "x", "team": ""})
    other = await seed.job(user_metadata={odd: "y"})
    empty = [await seed.job(user_metadata={}), await seed.job(user_metadata=None), await seed.job()]
    assert await ids(database, metadata={odd: "x"}) == [both]
    assert await ids(database, metadata={odd: "x", "team": ""}) == [both]
    assert await ids(database, metadata={"team": "x"}) == []
    assert await ids(database, metadata={odd: "y"}) == [other]
    assert sorted(await ids(database, metadata={})) == sorted(empty)


async def test_another_project_sees_and_touches_nothing(database: Database, seed: Seed) -> None:
    job_id = await seed.job()
    assert await ids(database, "proj_other") == []
    with pytest.raises(InvalidRequest):
        await ids(database, "proj_other", after=job_id)
    async with database.begin() as session:
        for call in (service.view, service.cancel):
            with pytest.raises(NotFound):
                await call(session, "proj_other", job_id)


async def test_cancel_shuts_the_worker_out_and_closes_the_ledger(database: Database, seed: Seed) -> None:
    job_id = await seed.job(status="queued")
    async with database.begin() as session:
        claim = await leases.claim(session, job_id, owner="w", lease_s=60, adapter_slots=8)
    assert claim is not None
    await seed.rollout(job_id, RolloutState.TRAINED)
    await seed.rollout(job_id, RolloutState.STARTED)
    async with database.begin() as session:
        await service.cancel(session, DEFAULT_PROJECT, job_id)
        found = await service.view(session, DEFAULT_PROJECT, job_id)
    assert found.job.status == "cancelled"
    assert found.job.attempt == claim.fence.attempt + 1
    assert found.job.finished_at is not None
    assert found.job.lease_owner is None
    assert found.counts == {"trained": 1, "cancelled": 1}
    with pytest.raises(leases.LeaseLost):
        async with database.begin() as session:
            await leases.fenced(session, claim.fence, step=3)


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled"])
async def test_an_ended_job_cannot_be_cancelled(database: Database, seed: Seed, status: str) -> None:
    job_id = await seed.job(status=status, finished_at=5.0)
    async with database.begin() as session:
        with pytest.raises(InvalidRequest) as caught:
            await service.cancel(session, DEFAULT_PROJECT, job_id)
    assert caught.value.message == f'Cannot cancel a job {job_id} that already has status "{status}".'


async def test_events_are_newest_first_and_paged(database: Database, seed: Seed) -> None:
    job_id = await seed.job()
    async with database.begin() as session:
        for number in range(3):
            await events.append(session, project_id=DEFAULT_PROJECT, job_id=job_id, message=str(number))
    seen: list[str] = []
    after = None
    for _ in range(3):
        async with database.read() as session:
            page = await service.list_events(session, DEFAULT_PROJECT, job_id, after=after, limit=1, ascending=False)
        seen.append(page.items[0].message)
        after = page.items[0].id
    assert seen == ["2", "1", "0"]
    assert not page.has_more


ATTEMPT = Attempt(DEFAULT_PROJECT, "hash", None, retry=False)


async def test_a_retry_finds_the_job_only_for_five_minutes(database: Database) -> None:
    retry = Attempt(DEFAULT_PROJECT, "hash", None, retry=True)
    async with database.begin() as session:
        assert await idempotency.remember(session, ATTEMPT, "ftjob-1")
        assert await idempotency.find(session, ATTEMPT) is None
        assert await idempotency.find(session, retry) == "ftjob-1"
        assert await idempotency.find(session, Attempt("proj_other", "hash", None, retry=True)) is None
        assert await idempotency.find(session, Attempt(DEFAULT_PROJECT, "else", None, retry=True)) is None
        await session.execute(idempotency.IdempotencyKey.__table__.update().values(created_at=now() - 301))
        assert await idempotency.find(session, retry) is None


async def test_a_retry_waits_for_the_request_that_it_repeats(database: Database) -> None:
    """The client has given up on it, the server has not: without the wait both would create a job."""
    retry = Attempt(DEFAULT_PROJECT, "hash", None, retry=True)
    began = asyncio.Event()

    async def first() -> None:
        async with database.begin() as session:
            assert await idempotency.find(session, ATTEMPT) is None
            await idempotency.remember(session, ATTEMPT, "ftjob-1")
            began.set()
            await asyncio.sleep(0.3)  # before its commit

    slow = asyncio.create_task(first())
    await began.wait()
    async with database.begin() as session:
        assert await idempotency.find(session, retry) == "ftjob-1"
    await slow


async def test_a_key_stands_for_one_body(database: Database) -> None:
    keyed = Attempt(DEFAULT_PROJECT, "hash", "k", retry=False)
    async with database.begin() as session:
        assert await idempotency.remember(session, keyed, "ftjob-1")
        assert not await idempotency.remember(session, keyed, "ftjob-2")
        assert await idempotency.find(session, keyed) == "ftjob-1"
        with pytest.raises(InvalidRequest):
            await idempotency.find(session, Attempt(DEFAULT_PROJECT, "else", "k", retry=True))


async def test_a_key_is_free_again_after_a_day(database: Database) -> None:
    keyed = Attempt(DEFAULT_PROJECT, "hash", "k", retry=False)
    async with database.begin() as session:
        await idempotency.remember(session, keyed, "ftjob-1")
        await session.execute(idempotency.IdempotencyKey.__table__.update().values(created_at=now() - 86_401))
        assert await idempotency.find(session, keyed) is None
        assert await idempotency.remember(session, keyed, "ftjob-2")
