"""The embedded runner's pass: read files, start supervisors within its slots, take back what the dead held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import select, update

from app.core.settings import Settings
from app.db.engine import Database, now
from app.db.tables import Event, Job, Worker
from tests.db.rows import Seed
from workers.local import Runner
from workers.process import Child, spawn


class Counting(Runner):
    """Starts `command` instead of a supervisor and remembers for which job."""

    command = ("sleep", "60")

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.started: list[str] = []

    def start(self, job_id: str) -> Child:
        self.started.append(job_id)
        return spawn(self.command, log=Path(self.settings.logs_dir / "x.log"), environment={}, leash=())


@pytest.fixture
async def runner(database: Database, settings: Settings) -> AsyncIterator[Counting]:
    made = Counting(settings)
    yield made
    await made.shut_down()


async def test_a_queued_job_gets_one_supervisor(runner: Counting, seed: Seed) -> None:
    job_id = await seed.job(status="queued")
    for _ in range(3):
        await runner.tick()
    assert runner.started == [job_id]


async def test_a_process_that_cannot_be_had_costs_no_running_job_and_is_told(
    runner: Counting, seed: Seed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.settings = settings.model_copy(update={"runner_slots": 2})
    running, waits = await seed.job(status="queued", created_at=1.0), await seed.job(status="queued", created_at=2.0)
    begin = runner.start

    def start(job_id: str) -> Child:
        if job_id == waits:
            raise PermissionError(13, "Permission denied", "x.log")
        return begin(job_id)

    monkeypatch.setattr(runner, "start", start)
    await runner.tick()
    assert runner.children[running].poll() is None
    async with runner.database.read() as session:
        assert "no worker process can be started" in (await session.get_one(Job, waits)).queue_reason
    assert not runner.starts.may_start(waits)


async def test_no_more_supervisors_than_slots_and_the_oldest_job_first(runner: Counting, seed: Seed) -> None:
    young, old = await seed.job(status="queued", created_at=2.0), await seed.job(status="queued", created_at=1.0)
    await runner.tick()
    assert runner.started == [old]
    runner.children[old].kill()
    async with runner.database.begin() as session:
        await session.execute(update(Job).where(Job.id == old).values(status="succeeded"))
    await runner.tick()
    assert runner.started == [old, young]


async def test_a_job_without_room_starts_no_process_and_nobody_overtakes_it(
    settings: Settings, database: Database, seed: Seed
) -> None:
    runner = Counting(settings.model_copy(update={"runner_slots": 2, "sampler_max_adapters": 4}))
    await seed.job(status="running", attempt=1, reserved_slots=1, lease_until=9e9)
    large = await seed.job(status="queued", plan={"max_staleness": 1}, created_at=1.0)
    await seed.job(status="queued", plan={"max_staleness": 0}, created_at=2.0)
    other = await seed.job(status="queued", model="other", created_at=3.0)
    for _ in range(2):
        await runner.tick()
    assert runner.started == [other]
    async with database.read() as session:
        assert "3 needed, 2 of 3 free" in (await session.get_one(Job, large)).queue_reason
    await runner.shut_down()


async def test_a_supervisor_that_ended_frees_its_slot_and_a_job_put_back_is_started_again(
    runner: Counting, seed: Seed
) -> None:
    runner.command = ("true",)
    job_id = await seed.job(status="queued")
    await runner.tick()
    await asyncio.to_thread(runner.children[job_id].process.wait, 10)
    await runner.tick()
    assert runner.started == [job_id, job_id]


async def test_a_supervisor_that_cannot_start_is_said_once_and_tried_again_at_growing_intervals(
    runner: Counting, seed: Seed
) -> None:
    runner.command = ("false",)
    clock = [0.0]
    runner.starts.clock = lambda: clock[0]
    job_id, waits = await seed.job(status="queued"), []
    await runner.tick()
    for _ in range(8):
        await asyncio.to_thread(runner.children[job_id].process.wait, 10)
        await runner.tick()
        waits.append(0.0)
        while job_id not in runner.children:
            clock[0] += 0.5
            waits[-1] += 0.5
            await runner.tick()
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    async with runner.database.read() as session:
        job = await session.get_one(Job, job_id)
        said = (await session.scalars(select(Event.message).where(Event.job_id == job_id))).all()
    assert job.status == "queued"
    assert "ended with code 1 before it took the job, 8 in a row" in job.queue_reason
    assert [line for line in said if "code 1" in line] == said[-1:]


async def test_a_start_that_came_to_its_claim_ends_the_waiting(runner: Counting, seed: Seed) -> None:
    runner.starts.failed(job_id := await seed.job(status="queued"))
    assert not runner.starts.may_start(job_id)
    runner.starts.took(job_id)
    await runner.tick()
    assert runner.started == [job_id]


async def test_an_expired_lease_is_taken_back(runner: Counting, seed: Seed) -> None:
    job_id = await seed.job(status="running", attempt=1, lease_owner="dead", lease_until=1.0)
    await runner.tick()
    await runner.tick()
    assert runner.started == [job_id]


async def test_files_are_read_beside_the_loop_and_once(
    runner: Counting, seed: Seed, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await seed.job()
    reading, may_end = [], asyncio.Event()

    async def read(database: Database, settings: Settings, catalogue: object, job: str, owner: str) -> None:
        reading.append(job)
        await may_end.wait()

    monkeypatch.setattr("workers.janitor.validate_job", read)
    for _ in range(3):
        await asyncio.wait_for(runner.tick(), 5)
        await asyncio.sleep(0)
    assert reading == [job_id]
    may_end.set()
    await asyncio.gather(*runner.reading.values())
    assert runner.reading == {}


async def test_running_announces_itself_and_stopping_ends_the_children(
    settings: Settings, database: Database, seed: Seed
) -> None:
    runner = Counting(settings)
    await seed.job(status="queued")
    running = asyncio.create_task(runner.run())
    while not runner.children:
        await asyncio.sleep(0.01)
    (child,) = runner.children.values()
    async with database.read() as session:
        (row,) = (await session.scalars(select(Worker))).all()
        assert (row.kind, row.host) == ("runner", settings.hostname)
        assert await session.scalar(select(now() - Worker.heartbeat)) < 10
    runner.stopping.set()
    await asyncio.wait_for(running, 10)
    assert child.poll() is not None
    async with database.read() as session:
        assert (await session.scalars(select(Worker))).all() == []
