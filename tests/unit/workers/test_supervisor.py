"""How an attempt ended decides what becomes of the job."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
from sqlalchemy import select, update

from app.core.settings import Settings
from app.db.engine import Database
from app.db.tables import Event, Job, Worker
from app.jobs import leases
from app.jobs.leases import Claim, LeaseLost
from app.samplers.errors import SamplerUnavailable
from tests.db.rows import Seed
from workers import supervisor
from workers.heartbeat import Heartbeat
from workers.presence import Presence
from workers.setup import JobFailure
from workers.starts import PUT_BACK
from workers.supervisor import STOP_S, supervise
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
    assert await conclude(settings, database, job_id, asyncio.CancelledError()) == PUT_BACK
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
        assert await conclude(settings, database, job_id, error) == PUT_BACK
        row, event = await job(database), await last_event(database)
        assert (row.status, row.crashes) == ("queued", crashes)
        assert (event.level, event.message) == ("warn", f"{words}; the job is queued again")
    assert await conclude(settings, database, job_id, error) == PUT_BACK
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
            await session.execute(update(Job).values(status="cancelled", attempt=9, **leases.given_up()))
        work: Any = asyncio.get_running_loop().create_future()
        work.set_exception(error)
        await supervisor._conclude(settings, database, claimed, work)

    with pytest.raises(LeaseLost):
        await cancelled(JobFailure("x", "y"))
    assert (await job(database)).status == "cancelled"


async def test_success_writes_nothing_more(settings: Settings, database: Database, job_id: str) -> None:
    assert await conclude(settings, database, job_id, None) == 0
    assert (await job(database)).status == "running"  # `Registry.succeeded` is the run's last act


async def test_what_a_dead_supervisor_left_on_this_host_is_ended_before_a_claim(
    settings: Settings, database: Database, job_id: str
) -> None:
    trainer = await asyncio.create_subprocess_exec("sleep", "60", start_new_session=True)
    dead = Presence(database, "supervisor", settings.hostname, "ftjob-0")
    await dead.announce()
    await dead.trainer_started(trainer.pid)
    async with database.begin() as session:
        await session.execute(update(Worker).values(process_started=1))
    assert await supervise(settings, "ftjob-unknown", None) == 0
    assert await asyncio.wait_for(trainer.wait(), 5) == -signal.SIGKILL
    async with database.read() as session:
        assert (await session.scalars(select(Worker))).all() == []


async def test_a_job_that_is_not_to_be_had_is_no_error(settings: Settings, database: Database, job_id: str) -> None:
    await claim(database, job_id)
    assert await supervise(settings, job_id, None) == 0
    assert await supervise(settings, "ftjob-unknown", None) == 0
    assert (await job(database)).attempt == 1


class FakeTrainer:
    def __init__(self) -> None:
        self.grace: list[float] = []
        self.environment: dict[str, str] = {}
        self.on_spawned: Any = None

    def use(self, environment: dict[str, str]) -> None:
        self.environment = environment

    async def stop(self, grace_s: float) -> None:
        self.grace.append(grace_s)

    def kill_group(self) -> None:
        self.grace.append(-1.0)


class FakeRun:
    """Starts a process for a trainer, then does what `then` says."""

    trainer: FakeTrainer

    def __init__(self, settings: Settings, database: Database, claim: Claim, heartbeat: Heartbeat) -> None:
        type(self).trainer = self.trainer = FakeTrainer()
        self.database = database

    async def then(self) -> None:
        raise NotImplementedError

    async def execute(self) -> None:
        await self.trainer.on_spawned(os.getpid())
        await self.then()

    async def close(self) -> None:
        return None


async def test_sigterm_puts_the_job_back_without_a_crash_and_lets_the_trainer_end_by_itself(
    settings: Settings, database: Database, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(FakeRun):
        async def then(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()

    monkeypatch.setattr(supervisor, "Run", Asked)
    async with database.begin() as session:
        await session.execute(update(Job).values(step=4, crashes=2))
    assert await asyncio.wait_for(supervise(settings, job_id, None), 20) == PUT_BACK
    row = await job(database)
    assert (row.status, row.step, row.crashes, row.attempt, row.lease_owner) == ("queued", 4, 2, 1, None)
    assert Asked.trainer.grace == [STOP_S]
    assert (await last_event(database)).message == "The worker was asked to stop; the job is queued again"


async def test_a_supervisor_that_is_asked_to_stop_before_its_claim_makes_none(
    settings: Settings, database: Database, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def asked(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.01)

    monkeypatch.setattr(supervisor, "end_leftovers", asked)
    assert await asyncio.wait_for(supervise(settings, job_id, None), 20) == 0
    row = await job(database)
    assert (row.status, row.attempt) == ("queued", 0)


async def test_a_cancelled_jobs_trainer_gets_no_grace(
    settings: Settings, database: Database, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cancelled(FakeRun):
        async def then(self) -> None:
            async with self.database.begin() as session:
                await session.execute(update(Job).values(status="cancelled", attempt=9, **leases.given_up()))
            raise LeaseLost(job_id)

    monkeypatch.setattr(supervisor, "Run", Cancelled)
    assert await asyncio.wait_for(supervise(settings, job_id, None), 20) == 0
    assert Cancelled.trainer.grace == [0.0]
    assert (await job(database)).status == "cancelled"


async def test_while_it_runs_its_row_names_the_job_and_the_trainer_and_then_it_is_gone(
    settings: Settings, database: Database, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Worker] = []

    class Looks(FakeRun):
        async def then(self) -> None:
            async with database.read() as session:
                seen.extend((await session.scalars(select(Worker))).all())

    monkeypatch.setattr(supervisor, "Run", Looks)
    assert await asyncio.wait_for(supervise(settings, job_id, None), 20) == 0
    (row,) = seen
    assert (row.kind, row.job_id, row.pid, row.trainer_pid) == ("supervisor", job_id, os.getpid(), os.getpid())
    assert row.trainer_started == row.process_started > 0
    assert Looks.trainer.environment == {"HONE_WORKER": row.id}
    async with database.read() as session:
        assert (await session.scalars(select(Worker))).all() == []
