"""Create and resume ring once they are committed; a broker that is away costs the client nothing.

Does not cover: who hears it (`tests/unit/workers/test_tasks`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from app.core.settings import Settings
from app.db.engine import Database
from tests.api.jobs_fixture import Files, install_model, upload
from tests.broker import Broker, broker_running, free_port
from tests.db.rows import Seed


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def settings(tmp_path: Path, port: int) -> Settings:
    return Settings(data_dir=tmp_path / "data", redis_url=f"redis://127.0.0.1:{port}/0")


@pytest.fixture
def broker(port: int) -> Iterator[Broker]:
    with broker_running(port) as made:
        yield made


@pytest.fixture
def files(client: OpenAI, settings: Settings) -> Files:
    install_model(settings)
    return upload(client)


def _rings(broker: Broker, expected: int) -> int:
    """After a moment: the ring follows the answer."""
    deadline = time.monotonic() + 10
    while broker.length("hone") < expected and time.monotonic() < deadline:
        time.sleep(0.02)
    return broker.length("hone")


def test_a_created_job_is_rung_for_once(broker: Broker, client: OpenAI, files: Files) -> None:
    client.fine_tuning.jobs.create(**files.body())
    assert _rings(broker, 1) == 1


async def test_a_resumed_job_is_rung_for(
    broker: Broker, client: OpenAI, database: Database, settings: Settings
) -> None:
    job_id = await Seed(database, settings).job(status="paused")
    client.fine_tuning.jobs.resume(job_id)
    assert _rings(broker, 1) == 1


def test_a_job_is_created_at_once_while_the_broker_is_down(client: OpenAI, files: Files) -> None:
    began = time.monotonic()
    job = client.fine_tuning.jobs.create(**files.body())
    assert time.monotonic() - began < 5
    assert client.fine_tuning.jobs.retrieve(job.id).status == "validating_files"
