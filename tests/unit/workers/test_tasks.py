"""A real Redis, a real Celery worker, a stub for the supervisor: rings start jobs, and no job needs a ring."""

from __future__ import annotations

import asyncio
import concurrent.futures
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import func, select, update

from app.core.settings import Settings
from app.db.engine import Database
from app.db.tables import Event, Job
from app.db.tables import Worker as Row
from app.jobs.doorbell import make_doorbell
from tests.broker import Broker, broker_running, free_port
from tests.db.rows import Seed
from workers.process import FD, Child, spawn
from workers.slot import Slot
from workers.tasks import SlotThread

START_S = 60.0
NEVER = 600.0
ROOT = Path(__file__).parents[3]


class Worker:
    """A worker in a process of its own."""

    def __init__(self, settings: Settings, *, job_s: float, look_s: float) -> None:
        self.log, self.notes = settings.root / "worker.log", settings.root / "notes"
        command = [sys.executable, "-m", "tests.unit.workers.rung_worker", str(self.notes), str(job_s), str(look_s), FD]
        self.child: Child = spawn(
            command,
            log=self.log,
            environment={**settings.environment(), "PYTHONPATH": str(ROOT)},
            leash=(),
            trusted=True,
        )

    def noted(self) -> list[str]:
        return self.notes.read_text().splitlines() if self.notes.exists() else []

    async def until(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not what():
            assert self.child.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            await asyncio.sleep(0.05)

    async def until_ready(self) -> None:
        await self.until(lambda: " ready." in self.log.read_text())

    async def until_noted(self, *lines: str) -> None:
        await self.until(lambda: len(self.noted()) >= len(lines))
        assert self.noted() == list(lines)

    async def until_ended(self) -> int:
        return await asyncio.wait_for(asyncio.to_thread(self.child.process.wait), START_S)


@pytest.fixture
def broker() -> Iterator[Broker]:
    with broker_running() as made:
        yield made


@pytest.fixture
async def start(settings: Settings, database: Database) -> AsyncIterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def begin(url: str, *, job_s: float = 0.0, look_s: float = NEVER) -> Worker:
        made.append(Worker(settings.model_copy(update={"redis_url": url}), job_s=job_s, look_s=look_s))
        return made[-1]

    yield begin
    for worker in made:
        await asyncio.to_thread(worker.child.stop, 10)


def ring(settings: Settings, broker: Broker, *jobs: str) -> None:
    bell = make_doorbell(settings.model_copy(update={"redis_url": broker.url}))
    for job_id in jobs:
        bell.ring(job_id, "tiny")
    bell.close()


async def status(database: Database, job_id: str) -> str:
    async with database.read() as session:
        return str(await session.scalar(select(Job.status).where(Job.id == job_id)))


async def has_status(database: Database, job_id: str, wanted: str) -> None:
    deadline = time.monotonic() + START_S
    while await status(database, job_id) != wanted:
        assert time.monotonic() < deadline, await status(database, job_id)
        await asyncio.sleep(0.05)


async def test_a_ring_starts_the_job_at_once_and_doubled_rings_run_it_once(
    settings: Settings, database: Database, seed: Seed, broker: Broker, start: Callable[..., Worker]
) -> None:
    worker = start(broker.url)
    await worker.until_ready()
    first, second = await seed.job(status="queued"), await seed.job(status="queued")
    ring(settings, broker, first, first, first, "ftjob-unknown", second)
    await has_status(database, second, "succeeded")
    assert worker.noted() == [f"{first} claimed 2,3", f"{second} claimed 2,3"]
    assert broker.length("hone") == 0
    async with database.read() as session:
        assert await session.scalar(select(func.max(Job.attempt))) == 1


async def test_without_a_broker_the_worker_finds_the_job_by_looking(
    database: Database, seed: Seed, start: Callable[..., Worker]
) -> None:
    job_id = await seed.job(status="queued")
    worker = start(f"redis://127.0.0.1:{free_port()}/0", look_s=0.2)
    await has_status(database, job_id, "succeeded")
    assert worker.noted() == [f"{job_id} claimed 2,3"]
    worker.child.terminate()
    await worker.until_ended()


async def test_sigterm_puts_the_job_back_and_ends_the_worker(
    settings: Settings, database: Database, seed: Seed, broker: Broker, start: Callable[..., Worker]
) -> None:
    worker = start(broker.url, job_s=NEVER)
    await worker.until_ready()
    job_id = await seed.job(status="queued")
    ring(settings, broker, job_id)
    await has_status(database, job_id, "running")
    worker.child.terminate()
    began = time.monotonic()
    await worker.until_ended()
    assert time.monotonic() - began < 10
    assert await status(database, job_id) == "queued"
    async with database.read() as session:
        messages = (await session.scalars(select(Event.message).where(Event.job_id == job_id))).all()
    assert "asked to stop; the job is queued again" in messages


async def test_a_worker_whose_parent_is_gone_puts_its_job_back_and_ends(
    settings: Settings, database: Database, seed: Seed, broker: Broker, start: Callable[..., Worker]
) -> None:
    worker = start(broker.url, job_s=NEVER, look_s=0.2)
    job_id = await seed.job(status="queued")
    await has_status(database, job_id, "running")
    worker.child.drop_leash()
    await worker.until_ended()
    assert await status(database, job_id) == "queued"


async def test_a_broker_that_comes_back_empty_costs_a_running_job_nothing_and_rings_again(
    settings: Settings, database: Database, seed: Seed, start: Callable[..., Worker]
) -> None:
    port = free_port()
    with broker_running(port) as broker:
        worker = start(broker.url, job_s=3.0)
        await worker.until_ready()
        first = await seed.job(status="queued")
        ring(settings, broker, first)
        await has_status(database, first, "running")
    with broker_running(port) as again:
        await has_status(database, first, "succeeded")
        second = await seed.job(status="queued")
        ring(settings, again, second)
        await has_status(database, second, "succeeded")
    assert worker.noted() == [f"{first} claimed 2,3", f"{second} claimed 2,3"]


class Reading(Slot):
    """Notes what it would have started."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, frozenset({"large"}), owner="here:1", environment={})
        self.started: list[str] = []
        self.ended: list[str] = []
        self.job_s = 0.05

    async def supervise(self, job_id: str) -> None:
        assert len(self.ended) == len(self.started), "two jobs at once"
        self.started.append(job_id)
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), self.job_s)
        self.ended.append(job_id)


async def test_a_slot_takes_only_what_waits_in_its_queues(settings: Settings, seed: Seed) -> None:
    slot = Reading(settings.model_copy(update={"queues": "big-*=large"}))
    await seed.job(status="queued")
    big = await seed.job(status="queued", model="big-one")
    await slot.tick()
    assert slot.started == [big]
    await slot.shut_down()


async def test_a_slot_runs_one_job_at_a_time_whether_rung_for_or_found(settings: Settings, seed: Seed) -> None:
    slot = Reading(settings.model_copy(update={"queues": "*=large"}))
    rung, found = await seed.job(status="queued"), await seed.job(status="queued")
    await asyncio.gather(slot.take(rung), slot.take(found), slot.tick())
    assert {*slot.ended} == {rung, found}
    await slot.shut_down()


class Full(Reading):
    """Jobs of the model `big` find no room."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.model_copy(update={"sampler_max_adapters": 4, "queues": "*=large"}))


async def test_a_job_without_room_starts_no_process_and_says_why_until_there_is_some(
    settings: Settings, database: Database, seed: Seed
) -> None:
    slot = Full(settings)
    holder = await seed.job(status="running", attempt=1, reserved_slots=2)
    waits = await seed.job(status="queued", plan={"max_staleness": 0}, created_at=1.0)
    await seed.job(status="queued", plan={"max_staleness": 0}, created_at=2.0)
    other = await seed.job(status="queued", model="other", created_at=3.0)
    await slot.tick()
    assert slot.started == [other]
    async with database.read() as session:
        reason = await session.scalar(select(Job.queue_reason).where(Job.id == waits))
    assert reason == "waits for adapter slots: 2 needed, 1 of 3 free"
    async with database.begin() as session:
        await session.execute(update(Job).where(Job.id == holder).values(status="succeeded", reserved_slots=0))
    assert await slot.take(waits)
    assert slot.started == [other, waits]
    await slot.shut_down()


async def test_a_slot_beats_while_a_job_runs(settings: Settings, database: Database, seed: Seed) -> None:
    slot = Reading(settings.model_copy(update={"queues": "*=large"}))
    slot.beat_s, slot.job_s = 0.02, 60.0
    await seed.job(status="queued")
    running = asyncio.create_task(slot.run())
    beats: set[float] = set()
    while not slot.started or len(beats) < 3:
        await asyncio.sleep(0.02)
        async with database.read() as session:
            beats.update((await session.scalars(select(Row.heartbeat).where(Row.kind == "worker"))).all())
    assert slot.ended == []
    slot.stopping.set()
    await asyncio.wait_for(running, 10)
    async with database.read() as session:
        assert (await session.scalars(select(Row))).all() == []


async def test_a_slot_that_fails_ends_its_process_in_order(settings: Settings) -> None:
    class Broken(Reading):
        async def tick(self) -> None:
            raise RuntimeError("a bug")

    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        thread = SlotThread(Broken(settings))
        await asyncio.to_thread(concurrent.futures.wait, [thread.ended], 10)
        await asyncio.to_thread(thread.join)
        assert told == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_a_ring_for_a_new_job_has_its_files_read_first(
    settings: Settings, database: Database, seed: Seed, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read(database: Database, settings: Settings, catalogue: object, job_id: str, owner: str) -> None:
        async with database.begin() as session:
            job = await session.get_one(Job, job_id)
            job.status = "queued"

    monkeypatch.setattr("workers.slot.validate_job", read)
    slot, job_id = Reading(settings), await seed.job()
    await slot.take(job_id)
    assert slot.started == [job_id]
    await slot.shut_down()


async def test_a_slot_that_stops_does_not_wait_for_files_to_be_read(
    settings: Settings, seed: Seed, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read(*_: object) -> None:
        await asyncio.sleep(NEVER)

    monkeypatch.setattr("workers.slot.validate_job", read)
    slot, job_id = Reading(settings), await seed.job()
    taking = asyncio.create_task(slot.take(job_id))
    await asyncio.sleep(0.1)
    slot.stopping.set()
    await asyncio.wait_for(taking, 5)
    assert slot.started == []
    await slot.shut_down()
