"""A ring arrives on the queue of the job's model, and a broker that is down or hangs costs the caller nothing."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest
import redis
from sqlalchemy import update

from app.core.settings import Settings
from app.db.engine import Database
from app.db.tables import Job
from app.jobs.doorbell import CLOSE_S, TASK, BadQueues, Bell, Silent, make_doorbell, queue_of
from tests.broker import Broker, broker_running, free_port
from tests.db.rows import Seed
from workers.janitor import Janitor


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with broker_running() as made:
        yield made


def test_a_ring_is_one_message_with_the_jobs_id_and_the_tasks_name(broker: Broker, settings: Settings) -> None:
    broker.clear()
    bell = make_doorbell(settings.model_copy(update={"redis_url": broker.url, "queues": "big-*=large"}))
    bell.ring("ftjob-1", "tiny")
    bell.ring("ftjob-2", "big-one")
    bell.close()
    with redis.Redis.from_url(broker.url) as client:
        [large] = client.lrange("large", 0, -1)  # type: ignore[misc]  # typed for both of its clients
        [small] = client.lrange("hone", 0, -1)  # type: ignore[misc]
    assert json.loads(small)["headers"]["task"] == TASK
    assert "ftjob-1" in json.loads(small)["headers"]["argsrepr"]
    assert "ftjob-2" in json.loads(large)["headers"]["argsrepr"]


def test_without_redis_nothing_rings(settings: Settings) -> None:
    assert isinstance(make_doorbell(settings), Silent)


@pytest.mark.parametrize(
    ("queues", "model", "queue"),
    [
        ("", "m", "hone"),
        ("a=x", "a", "x"),
        ("a=x", "ab", "hone"),
        ("a-*=x, *=y", "a-1", "x"),
        ("a-*=x, *=y", "b", "y"),
        ("*=y, a=x", "a", "y"),
    ],
)
def test_the_first_pattern_that_fits_names_the_queue(queues: str, model: str, queue: str) -> None:
    assert queue_of(queues, model) == queue


@pytest.mark.parametrize("queues", ["a", "=x", "a=", "b=y,a"])
def test_a_queue_setting_that_cannot_be_read_is_refused_at_start(queues: str, settings: Settings) -> None:
    with pytest.raises(BadQueues, match="HONE_QUEUES"):
        make_doorbell(settings.model_copy(update={"queues": queues}))


def _took(settings: Settings, url: str) -> float:
    began = time.monotonic()
    bell = make_doorbell(settings.model_copy(update={"redis_url": url}))
    assert isinstance(bell, Bell)
    for number in range(1200):  # more than it keeps
        bell.ring(f"ftjob-{number}", "tiny")
    rung = time.monotonic() - began
    bell.close()
    assert time.monotonic() - began < CLOSE_S + 2
    return rung


def test_a_broker_that_is_down_delays_nobody(settings: Settings) -> None:
    assert _took(settings, f"redis://127.0.0.1:{free_port()}/0") < 1.5


def test_a_broker_that_accepts_and_is_silent_delays_nobody(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert _took(settings, f"redis://127.0.0.1:{silent.getsockname()[1]}/0") < 1.5


def test_the_bell_outlives_a_failed_ring(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    bell = make_doorbell(settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{port}/0"}))
    bell.ring("ftjob-1", "tiny")
    deadline = time.monotonic() + 10
    while "ftjob-1 was not rung" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with broker_running(port) as broker:
        bell.ring("ftjob-2", "tiny")
        bell.close()
        assert broker.length("hone") == 1


async def _move(database: Database, job_id: str, status: str) -> None:
    async with database.begin() as session:
        await session.execute(update(Job).where(Job.id == job_id).values(status=status))


async def test_the_janitor_rings_once_for_each_time_a_job_joins_the_queue(
    settings: Settings, database: Database, seed: Seed
) -> None:
    janitor = Janitor(settings)
    rung: list[str] = []
    janitor.bell.ring = lambda job_id, model: rung.append(f"{job_id} {model}")  # type: ignore[method-assign]
    job_id = await seed.job(status="queued")
    for _ in range(3):
        await janitor.tick()
    assert rung == [f"{job_id} tiny"]
    await _move(database, job_id, "paused")
    await janitor.tick()
    await _move(database, job_id, "queued")
    await janitor.tick()
    assert rung == [f"{job_id} tiny"] * 2
    await janitor.shut_down()
