"""The thread that renews the lease, and when it stops doing so."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, select, update
from sqlalchemy.exc import OperationalError

from app.db.engine import Database, now
from app.db.tables import DEFAULT_PROJECT, Job
from app.jobs.leases import Fence
from tests.db.rows import Seed
from workers import heartbeat as beating
from workers.heartbeat import Heartbeat

LEASE_S = 1.6


class Lost:
    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.event = threading.Event()

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)
        self.event.set()

    async def wait(self, seconds: float = 10.0) -> bool:
        return await asyncio.to_thread(self.event.wait, seconds)


@pytest.fixture
async def fence(seed: Seed) -> Fence:
    job_id = await seed.job(status="running", attempt=1, lease_owner="me", lease_until=1.0)
    return Fence(job_id, 1, DEFAULT_PROJECT)


@pytest.fixture
def lost() -> Lost:
    return Lost()


@pytest.fixture
def beat(database: Database, fence: Fence, lost: Lost) -> Iterator[Heartbeat]:
    made = Heartbeat(database.url, fence, LEASE_S, lost)
    yield made
    made.stop()


async def left(database: Database) -> float:
    async with database.read() as session:
        return await session.scalar(select(Job.lease_until - now())) or 0.0


async def test_it_renews_the_lease_while_the_loop_moves(
    database: Database, beat: Heartbeat, lost: Lost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beating, "LOOP_SILENCE_S", 0.0)  # so that half a lease of silence would be too much
    beat.start()
    for _ in range(12):
        await asyncio.sleep(0.05)
        beat.moved()
    assert await left(database) > 0
    assert lost.reasons == []


async def test_what_else_says_that_we_are_alive_goes_with_each_renewal_and_cannot_cost_the_lease(
    database: Database, fence: Fence, lost: Lost
) -> None:
    seen: list[object] = []

    def beside(engine: Engine) -> None:
        seen.append(engine)
        raise OperationalError("", {}, Exception("no such table: workers"))

    beat = Heartbeat(database.url, fence, LEASE_S, lost, beside)
    beat.start()
    async with asyncio.timeout(20):
        while len(seen) < 3:
            beat.moved()
            await asyncio.sleep(0.05)
    await asyncio.to_thread(beat.stop)
    assert lost.reasons == []


async def test_a_loop_that_hangs_loses_its_job(
    database: Database, beat: Heartbeat, lost: Lost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beating, "LOOP_SILENCE_S", 0.0)
    beat.start()
    assert await lost.wait()
    assert lost.reasons == ["the lease could not be renewed in time"]


async def test_a_renewal_that_hangs_fences_us_before_the_lease_is_over(
    beat: Heartbeat, lost: Lost, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(beating.leases, "renew", lambda *_: released.wait(60))
    began = time.monotonic()
    beat.start()
    try:
        assert await lost.wait()
        assert time.monotonic() - began < 30
    finally:
        released.set()
    await asyncio.to_thread(beat.stop)
    assert lost.reasons == ["the lease could not be renewed in time"]


async def test_another_attempt_is_noticed_and_told_once(database: Database, beat: Heartbeat, lost: Lost) -> None:
    beat.start()
    async with database.begin() as session:
        await session.execute(update(Job).values(attempt=2, lease_until=now() + 500))
    assert await lost.wait()
    await asyncio.sleep(LEASE_S / 2)
    assert lost.reasons == ["the lease is lost: cancelled, or taken by another worker"]
    assert await left(database) > 400  # the other's lease was not touched


async def test_a_cancelled_job_is_noticed(database: Database, beat: Heartbeat, lost: Lost) -> None:
    beat.start()
    async with database.begin() as session:
        await session.execute(update(Job).values(status="cancelled", lease_owner=None))
    assert await lost.wait()


async def test_a_database_that_fails_fences_us_before_the_lease_is_over(fence: Fence, lost: Lost, tmp_path) -> None:
    away = Heartbeat(f"sqlite+aiosqlite:///{tmp_path / 'no-tables.db'}", fence, LEASE_S, lost)
    away.start()
    assert await lost.wait()
    away.stop()
    assert lost.reasons == ["the lease could not be renewed in time"]


async def test_after_stop_nothing_is_renewed(database: Database, beat: Heartbeat, lost: Lost) -> None:
    beat.start()
    await asyncio.to_thread(beat.stop)
    async with database.begin() as session:
        await session.execute(update(Job).values(lease_until=1.0))
    await asyncio.sleep(LEASE_S / 2)
    assert await left(database) < 0
    assert lost.reasons == []


def test_stopping_before_the_start_is_fine(fence: Fence, lost: Lost) -> None:
    Heartbeat("sqlite+aiosqlite:///unused.db", fence, 60, lost).stop()
