"""The keeper, with a small server for a sampler: it comes when wanted, is replaced when it dies, goes when idle."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from sqlalchemy import select, update

from app.core.settings import Settings
from app.db.engine import Database
from app.db.tables import Sampler, SamplerWant
from app.models.catalogue import BaseModel
from app.samplers import repository
from tests.tiny import make_weightless_llama
from workers.sampler import keeper as keeping
from workers.sampler.keeper import Keeper

SERVER = """
import http.server, json, sys
if sys.argv[1] == "broken": print("no such device", flush=True); sys.exit(3)
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = {"/v1/models": {"data": [{"id": sys.argv[1]}]}, "/version": {"dtype": "float32"}}.get(self.path, {})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Answer).serve_forever()
"""


class SmallKeeper(Keeper):
    serves = "tiny"

    def command(self, model: BaseModel, port: int) -> list[str]:
        return [sys.executable, "-I", "-S", "-c", SERVER, self.serves, str(port)]


Make = Callable[..., SmallKeeper]


@pytest.fixture
async def keepers(database: Database, settings: Settings, tmp_path: Path) -> AsyncIterator[Make]:
    make_weightless_llama(settings.models_dir / "tiny")
    made: list[SmallKeeper] = []

    def make(**values: object) -> SmallKeeper:
        made.append(SmallKeeper(settings.model_copy(update=values)))
        return made[-1]

    yield make
    for keeper in made:
        await keeper.shut_down()


async def want(database: Database, base_model: str = "tiny", seconds: float = 60) -> None:
    async with database.begin() as session:
        await repository.want(session, base_model, seconds)


async def rows(database: Database) -> list[Sampler]:
    async with database.read() as session:
        return list((await session.scalars(select(Sampler))).all())


async def until(keeper: Keeper, condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await keeper.tick()
            await asyncio.sleep(0.02)


async def test_without_a_want_nothing_is_started(keepers: Make) -> None:
    keeper = keepers()
    await keeper.tick()
    assert keeper.kept == {}


async def test_a_wanted_sampler_is_registered_once_it_is_healthy(database: Database, keepers: Make) -> None:
    keeper = keepers()
    await want(database)
    await until(keeper, lambda: rows(database))
    await keeper.tick()
    (row,) = await rows(database)
    assert (row.base_model, row.host, row.info["dtype"]) == ("tiny", keeper.settings.hostname, "float32")
    assert row.url == keeper.kept["tiny"].url


async def test_a_sampler_that_died_is_replaced_under_a_new_id(
    database: Database, keepers: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "BACK_OFF_S", (0.0,))
    keeper = keepers()
    await want(database)
    await until(keeper, lambda: rows(database))
    (old,) = await rows(database)
    child = keeper.kept["tiny"].child
    assert child is not None
    os.killpg(child.pid, signal.SIGKILL)

    async def replaced() -> bool:
        return [row.id for row in await rows(database)] not in ([], [old.id])

    await until(keeper, replaced)
    assert child.poll() is not None


async def test_one_that_does_not_start_says_why_and_is_not_started_in_a_loop(database: Database, keepers: Make) -> None:
    keeper = keepers()
    keeper.serves = "broken"
    await want(database)

    async def failed_twice() -> bool:
        return keeper.failures.get("tiny", 0) == 2

    await until(keeper, failed_twice)
    async with database.read() as session:
        assert "no such device" in (await session.scalar(select(SamplerWant.error)) or "")
    await keeper.tick()
    assert keeper.kept == {}  # a second of rest


async def test_a_server_of_another_model_is_not_registered(database: Database, keepers: Make) -> None:
    keeper = keepers()
    keeper.serves = "another"
    await want(database)

    async def failed() -> bool:
        return bool(keeper.failures)

    await until(keeper, failed)
    assert await rows(database) == []


async def test_an_unknown_model_is_told_to_whoever_wants_it(database: Database, keepers: Make) -> None:
    keeper = keepers()
    await want(database, "ghost")
    await keeper.tick()
    async with database.read() as session:
        assert "ghost" in (await session.scalar(select(SamplerWant.error)) or "")
    assert keeper.kept == {}


async def test_one_that_nobody_wants_any_more_is_stopped(database: Database, keepers: Make) -> None:
    keeper = keepers(sampler_idle_s=0.05)
    await want(database)
    await until(keeper, lambda: rows(database))
    child = keeper.kept["tiny"].child
    async with database.begin() as session:
        await session.execute(update(SamplerWant).values(wanted_until=1.0))
    await asyncio.sleep(0.06)
    await keeper.tick()
    assert await rows(database) == []
    assert child is not None
    assert child.poll() is not None


async def test_samplers_that_run_elsewhere_are_found_by_what_they_serve_and_never_stopped(
    database: Database, keepers: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "BACK_OFF_S", (0.0,))
    elsewhere = keepers()
    await want(database)
    await until(elsewhere, lambda: rows(database))
    (url,) = [kept.url for kept in elsewhere.kept.values()]
    async with database.begin() as session:
        await repository.remove(session, host=elsewhere.settings.hostname)
    wrong = keepers()  # serves another model
    wrong.serves = "another"
    await wrong.start("tiny")
    keeper = keepers(sampler_urls=f" {wrong.kept['tiny'].url}, {url} ,")
    await until(keeper, lambda: rows(database))
    (row,) = await rows(database)
    assert row.url == url
    await keeper.forget(keeper.kept["tiny"])
    child = elsewhere.kept["tiny"].child
    assert child is not None
    assert child.poll() is None


async def test_a_beat_refreshes_only_what_answers(database: Database, keepers: Make) -> None:
    keeper = keepers()
    await want(database)
    await until(keeper, lambda: rows(database))
    async with database.begin() as session:
        await session.execute(update(Sampler).values(heartbeat=1.0))
    await keeper.beat()
    assert (await rows(database))[0].heartbeat > 1e9
    child = keeper.kept["tiny"].child
    assert child is not None
    os.killpg(child.pid, signal.SIGKILL)
    child.process.wait()
    async with database.begin() as session:
        await session.execute(update(Sampler).values(heartbeat=1.0))
    await keeper.beat()
    assert (await rows(database))[0].heartbeat == 1.0
