from __future__ import annotations

import asyncio
import shutil

import httpx
import pytest
from sqlalchemy import text

from app.db.engine import Database
from app.web.readiness import Readiness
from tests.api.live_server import LiveServer


def test_a_migrated_service_is_ready_without_any_worker(http: httpx.Client) -> None:
    assert http.get("/healthz").status_code == 503
    answer = http.get("/readyz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok", "missing": {}})


def test_probes_need_no_key(live_server: LiveServer) -> None:
    for path in ("/livez", "/readyz", "/metrics"):
        assert httpx.get(f"{live_server.url}{path}", timeout=30).status_code == 200


async def test_an_older_database_is_named(http: httpx.Client, database: Database) -> None:
    async with database.begin() as session:
        await session.execute(text("UPDATE alembic_version SET version_num = '0000'"))
    answer = http.get("/readyz")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "2"
    assert list(answer.json()["missing"]) == ["migration"]
    assert "0000" in answer.json()["missing"]["migration"]


def test_storage_that_cannot_be_written_is_named(http: httpx.Client, live_server: LiveServer) -> None:
    shutil.rmtree(live_server.settings.files_dir, ignore_errors=True)
    live_server.settings.files_dir.write_text("a file where the directory should be")
    answer = http.get("/readyz")
    assert answer.status_code == 503
    assert list(answer.json()["missing"]) == ["storage"]


def test_looking_leaves_nothing_in_storage(http: httpx.Client, live_server: LiveServer) -> None:
    http.get("/readyz")
    assert [path for path in live_server.settings.files_dir.rglob("*") if path.is_file()] == []


async def test_a_check_that_hangs_is_named_in_time_and_not_started_again() -> None:
    started, go_on = 0, asyncio.Event()

    async def hanging() -> None:
        nonlocal started
        started += 1
        await go_on.wait()

    async def fine() -> None:
        return None

    readiness = Readiness({"database": fine, "storage": hanging}, deadline_s=0.01)
    for _ in range(3):
        assert await readiness.missing() == {"storage": "no answer within 0.01 s"}
    assert started == 1
    go_on.set()
    await asyncio.sleep(0)
    assert await readiness.missing() == {}
    assert started == 2


async def test_a_check_that_cannot_reach_its_thing_says_so() -> None:
    async def refused() -> None:
        raise ConnectionRefusedError

    assert await Readiness({"database": refused}).missing() == {"database": "does not answer (ConnectionRefusedError)"}


async def test_a_bug_in_a_check_is_not_taken_for_an_outage() -> None:
    async def broken() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await Readiness({"database": broken}).missing()
