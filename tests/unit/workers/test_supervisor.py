"""How an attempt ended decides what becomes of the job."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import select, update

from app.core.settings import Settings
from app.db.engine import Database
from app.db.tables import Event, Job
from app.jobs import leases
from app.jobs.leases import Claim, LeaseLost
from app.samplers.errors import SamplerUnavailable
from tests.db.rows import Seed
from workers import supervisor
from workers.setup import JobFailure
from workers.supervisor import supervise
from workers.trainer_link import TrainerDied


@pytest.fixture
async def job_id(seed: Seed) -> str:
    return await seed.job(status="queued", plan={"max_staleness": 0})


async def claim(database: Database, job_id: str) -> Claim:
    async with database.begin() as session:
        found = await leases.claim(session, job_id, owner="me", lease_s=60, adapter_slots=8)
    assert found is not None
    return found


async def conclude(settings: Settings, database: Database, job_id: str, error: BaseException | None) -> int:
    """Claim the job and let its run end with `error`."""
    claimed = await claim(database, job_id)

    async def run() -> None:
        if error is not None:
            raise error

    work = asyncio.create_task(run())
    await asyncio.gather(work, return_exceptions=True)
    return await supervisor._conclude(settings, database, claimed, work)


async def job(database: Database) -> Job:
    async with database.read() as session:
        return (await session.scalars(select(Job))).one()


async def last_event(database: Database) -> Event:
    async with database.read() as session:
        return (await session.scalars(select(Event).order_by(Event.seq.desc()))).first()  # type: ignore[return-value]


async def test_a_worker_that_was_asked_to_stop_puts_the_job_back_without_a_crash(
    settings: Settings, database: Database, job_id: str
) -> None:
    assert await conclude(settings, database, job_id, asyncio.CancelledError()) == 1
    row = await job(database)
    assert (row.status, row.crashes, row.lease_owner) == ("queued", 0, None)


async def test_a_failure_with_a_reason_ends_the_job(settings: Settings, database: Database, job_id: str) -> None:
    failure = JobFailure("tool_unreachable", "no answer", "tools", {"url": "http://x"})
    assert await conclude(settings, database, job_id, failure) == 0
    row = await job(database)
    assert (row.status, row.error) == (
        "failed",
        {"code": "tool_unreachable", "message": "no answer", "param": "tools"},
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TrainerDied("the trainer's process ended (signal 9)"), "the trainer's process ended (signal 9)"),
        (SamplerUnavailable("gone", url="http://s"), "gone (http://s)"),
        (ZeroDivisionError("ours"), "The worker crashed (ZeroDivisionError: ours)"),
    ],
)
async def test_a_crash_puts_the_job_back_until_the_budget_is_spent(
    settings: Settings, database: Database, job_id: str, error: Exception, words: str
) -> None:
    for crashes in (1, 2):
        assert await conclude(settings, database, job_id, error) == 1
        row, event = await job(database), await last_event(database)
        assert (row.status, row.crashes) == ("queued", crashes)
        assert (event.level, event.message) == ("warn", f"{words}; the job is queued again")
    assert await conclude(settings, database, job_id, error) == 1
    row = await job(database)
    assert (row.status, (row.error or {})["code"]) == ("failed", "worker_crashed")
    assert words in (row.error or {})["message"]


async def test_what_the_trainer_said_last_is_in_the_event(settings: Settings, database: Database, job_id: str) -> None:
    for _ in range(3):
        await conclude(settings, database, job_id, TrainerDied("died", "out of memory at layer 3"))
    event = await last_event(database)
    assert (event.data or {})["detail"] == "out of memory at layer 3"


async def test_a_job_that_is_somebody_elses_is_left_alone(settings: Settings, database: Database, job_id: str) -> None:
    with pytest.raises(LeaseLost):
        await conclude(settings, database, job_id, LeaseLost(job_id))
    assert (await job(database)).status == "running"


async def test_a_job_that_was_cancelled_meanwhile_stays_cancelled(
    settings: Settings, database: Database, job_id: str
) -> None:
    async def cancelled(error: BaseException) -> None:
        claimed = await claim(database, job_id)
        async with database.begin() as session:
            await session.execute(update(Job).values(status="cancelled", attempt=9, lease_owner=None, reserved_slots=0))
        work: Any = asyncio.get_running_loop().create_future()
        work.set_exception(error)
        await supervisor._conclude(settings, database, claimed, work)

    with pytest.raises(LeaseLost):
        await cancelled(JobFailure("x", "y"))
    assert (await job(database)).status == "cancelled"


async def test_success_writes_nothing_more(settings: Settings, database: Database, job_id: str) -> None:
    assert await conclude(settings, database, job_id, None) == 0
    assert (await job(database)).status == "running"  # `Registry.succeeded` is the run's last act


async def test_a_job_that_is_not_to_be_had_is_no_error(settings: Settings, database: Database, job_id: str) -> None:
    await claim(database, job_id)
    assert await supervise(settings, job_id, None) == 0
    assert await supervise(settings, "ftjob-unknown", None) == 0
    assert (await job(database)).attempt == 1
