"""What only PostgreSQL does: it restarts, cuts connections, and holds a lock for a client that is frozen.

Does not cover: what holds on both databases (the rest of this folder).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import DBAPIError, OperationalError

from app.db import postgres
from app.db.engine import Database, create_sync
from app.db.tables import DEFAULT_PROJECT, Event, Job
from app.jobs import events, leases, service
from tests import postgres as real
from tests.db.rows import Seed

DATABASES = ("postgresql",)
CUT = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name AND pid <> pg_backend_pid()")


@pytest.fixture
def mortal(request: pytest.FixtureRequest) -> real.Server:
    """A server that may be stopped."""
    server: real.Server = request.getfixturevalue("postgres")
    if server.engine is None:
        pytest.skip(f"the server of {real.VARIABLE} is not ours to stop")
    return server


@pytest.fixture
async def on_mortal(mortal: real.Server) -> AsyncIterator[Database]:
    made = Database(mortal.create_database())
    yield made
    await made.close()
    mortal.drop_database(made.url)


async def one(database: Database) -> int | None:
    async with database.begin() as session:
        return await session.scalar(text("SELECT 1"))


@pytest.mark.parametrize("crash", [False, True], ids=["stop", "crash"])
async def test_after_a_restart_of_the_server_every_pooled_connection_works_again(
    mortal: real.Server, on_mortal: Database, crash: bool
) -> None:
    engine = create_sync(on_mortal.url)
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    await asyncio.gather(*(one(on_mortal) for _ in range(8)))
    await asyncio.to_thread(mortal.restart, crash=crash)
    assert await asyncio.gather(*(one(on_mortal) for _ in range(8))) == [1] * 8
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1
    engine.dispose()


async def test_while_the_server_is_down_the_error_is_the_one_that_is_answered_with_503(
    mortal: real.Server, on_mortal: Database
) -> None:
    assert await one(on_mortal) == 1
    await asyncio.to_thread(mortal.stop)
    try:
        with pytest.raises(OperationalError):
            await one(on_mortal)
    finally:
        await asyncio.to_thread(mortal.start)
    assert await one(on_mortal) == 1


async def test_a_transaction_cut_in_the_middle_writes_nothing(database: Database, seed: Seed) -> None:
    job_id = await seed.job(status="queued", plan={})
    name = database.engine.url.database

    async def work() -> None:
        async with database.begin() as session:
            await leases.claim(session, job_id, owner="w", lease_s=60, adapter_slots=8)
            async with database.begin() as other:
                await other.execute(CUT, {"name": name})
            await session.execute(text("SELECT 1"))

    with pytest.raises(OperationalError):
        await work()
    async with database.read() as session:
        job = (await service.view(session, DEFAULT_PROJECT, job_id)).job
    assert (job.status, job.attempt) == ("queued", 0)


async def test_a_worker_frozen_inside_a_transaction_loses_its_lock(database: Database, seed: Seed) -> None:
    job_id = await seed.job(status="queued", plan={})
    async with database.read() as session:
        assert await session.scalar(text("SHOW idle_in_transaction_session_timeout")) == "20s"
        assert await session.scalar(text("SHOW lock_timeout")) == "10s"

    async def frozen() -> None:
        async with database.begin() as session:
            await session.execute(text("SET LOCAL idle_in_transaction_session_timeout = '300ms'"))
            await session.execute(update(Job).values(step=9))
            async with asyncio.timeout(5), database.begin() as other:  # waits until the lock is free
                await other.execute(update(Job).where(Job.id == job_id).values(crashes=1))
            await session.execute(text("SELECT 1"))

    with pytest.raises(DBAPIError):
        await frozen()
    async with database.read() as session:
        job = (await service.view(session, DEFAULT_PROJECT, job_id)).job
    assert (job.step, job.crashes) == (0, 1)


async def test_a_reading_transaction_cannot_write(database: Database, seed: Seed) -> None:
    await seed.job()
    with pytest.raises(DBAPIError, match="read-only"):
        async with database.read() as session:
            await session.execute(update(Job).values(step=9))


async def test_what_postgresql_refuses_is_stored_with_a_mark_and_searched(database: Database, seed: Seed) -> None:
    bad = "a\x00b\ud800c"
    job_id = await seed.job(
        activity=bad, user_metadata={bad: bad, "team": "\U0001f600"}, live={"x": [bad, 1, None, float("nan")]}
    )
    async with database.begin() as session:
        await events.append(session, project_id=DEFAULT_PROJECT, job_id=job_id, message=bad)
    async with database.read() as session:
        for metadata in ({"team": "\U0001f600"}, {bad: bad}):
            page = await service.list_jobs(session, DEFAULT_PROJECT, after=None, limit=5, metadata=metadata)
            assert [view.job.id for view in page.items] == [job_id]
        job = page.items[0].job
        assert await session.scalar(select(Event.message)) == "a\ufffdb\ufffdc"
    assert (job.activity, job.live) == ("a\ufffdb\ufffdc", {"x": ["a\ufffdb\ufffdc", 1, None, None]})


@pytest.mark.parametrize("given", ["", "plain", "naïve \U0001f600 \u4f60", "\\u0000 and \\ud800 spelt out"])
def test_all_other_text_is_kept_as_it_is(given: str) -> None:
    assert postgres.keepable(given) == given
    assert json.loads(postgres.keepable_json({given: [given]})) == {given: [given]}
