"""The keeper, with a small server for a sampler: it comes when wanted, is replaced when it dies, goes when idle."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import OperationalError

from app.core.settings import Settings
from app.db.engine import Database
from app.db.tables import Sampler, SamplerWant
from app.models.catalogue import BaseModel
from app.samplers import client as clients
from app.samplers import repository
from app.samplers.client import SamplerClient
from tests.tiny import make_weightless_llama
from workers.process import Child
from workers.sampler import kept as keeping_places
from workers.sampler.engines import NoEngine
from workers.sampler.keeper import Keeper
from workers.sampler.kept import Kept, Place
from workers.sampler.launch import Engine, Launch

# argv: what it serves, the port; "broken" ends at start, "mute" gives no tokens, "plain" takes no adapters.
SERVER = """
import http.server, json, sys
serves = sys.argv[1]
if serves == "broken": print("no such device", flush=True); sys.exit(3)
class Answer(http.server.BaseHTTPRequestHandler):
    def answer(self, body, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def do_GET(self):
        models = {"data": [{"id": "tiny" if serves in ("mute", "plain") else serves, "max_model_len": 4096}]}
        self.answer({"/v1/models": models, "/version": {"version": "9", "dtype": "float32"}}.get(self.path, {}))
    def do_POST(self):
        if serves == "mute":
            print("RuntimeError: head_dim=16 is not supported", flush=True)
            return self.answer({"error": {"message": "EngineCore encountered an issue"}}, 500)
        if "lora" in self.path:
            body = {"detail": "Not Found"} if serves == "plain" else {"error": {"message": "no such adapter"}}
            return self.answer(body, 404)
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        ids, count = asked["prompt"], asked["max_tokens"]
        scores = [None, *({str(i): {"logprob": -1.0}} for i in ids[1:])] if "prompt_logprobs" in asked else None
        choice = {"token_ids": [5] * count, "logprobs": {"token_logprobs": [-1.0] * count}, "text": "x",
                  "prompt_token_ids": ids, "finish_reason": "length", "prompt_logprobs": scores}
        self.answer({"model": asked["model"], "choices": [choice], "usage": {"prompt_tokens": len(ids)}})
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Answer).serve_forever()
"""


@dataclass
class SmallEngine:
    serves: str = "tiny"
    servers: int = 1
    name: str = "small"

    def launch(self, model: BaseModel, server: int, port: int) -> Launch:
        return Launch((sys.executable, "-I", "-S", "-c", SERVER, self.serves, str(port)), {}, None, 64)


class SmallKeeper(Keeper):
    small: SmallEngine

    async def choose_engine(self) -> Engine:
        return self.small


Make = Callable[..., SmallKeeper]


@pytest.fixture
async def keepers(database: Database, settings: Settings, tmp_path: Path) -> AsyncIterator[Make]:
    make_weightless_llama(settings.models_dir / "tiny")
    made: list[SmallKeeper] = []

    def make(serves: str = "tiny", servers: int = 1, **values: object) -> SmallKeeper:
        keeper = SmallKeeper(settings.model_copy(update=values))
        keeper.small = SmallEngine(serves, servers)
        made.append(keeper)
        return keeper

    yield make
    for keeper in made:
        await keeper.shut_down()


async def want(database: Database, base_model: str = "tiny", seconds: float = 60) -> None:
    async with database.begin() as session:
        await repository.want(session, base_model, seconds)


async def failed(keeper: Keeper) -> bool:
    return bool(keeper.failures.count)


async def rows(database: Database) -> list[Sampler]:
    async with database.read() as session:
        return list((await session.scalars(select(Sampler))).all())


def only(keeper: Keeper) -> Kept:
    (kept,) = keeper.kept.values()
    return kept


def child_of(keeper: Keeper) -> Child:
    child = only(keeper).child
    assert child is not None
    return child


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
    assert row.url == only(keeper).url
    assert (row.info["engine"], row.info["version"], row.info["max_model_len"]) == ("vllm", "9", 4096)
    assert row.adapter_root == str(keeper.settings.root)


async def test_a_sampler_that_died_is_replaced_under_a_new_id(
    database: Database, keepers: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping_places, "BACK_OFF_S", (0.0,))
    keeper = keepers()
    await want(database)
    await until(keeper, lambda: rows(database))
    (old,) = await rows(database)
    child = child_of(keeper)
    os.killpg(child.pid, signal.SIGKILL)

    async def replaced() -> bool:
        return [row.id for row in await rows(database)] not in ([], [old.id])

    await until(keeper, replaced)
    assert child.poll() is not None


async def test_one_that_does_not_start_says_why_and_is_not_started_in_a_loop(database: Database, keepers: Make) -> None:
    keeper = keepers("broken")
    await want(database)

    async def failed_twice() -> bool:
        return sum(keeper.failures.count.values()) == 2

    await until(keeper, failed_twice)
    async with database.read() as session:
        error = await session.scalar(select(SamplerWant.error)) or ""
    assert "exit code 3: no such device" in error
    assert "sampler-tiny.log" in error
    await keeper.tick()
    assert keeper.kept == {}  # a second of rest


async def test_a_server_of_another_model_is_not_registered(database: Database, keepers: Make) -> None:
    keeper = keepers("another")
    await want(database)
    await until(keeper, lambda: failed(keeper))
    assert await rows(database) == []
    assert "serves another" in keeper.failures.of("tiny")


async def test_one_whose_first_request_fails_is_not_registered_and_its_log_says_why(
    database: Database, keepers: Make
) -> None:
    keeper = keepers("mute")
    await want(database)
    await until(keeper, lambda: failed(keeper))
    assert await rows(database) == []
    assert "first requests failed" in keeper.failures.of("tiny")
    assert "head_dim=16 is not supported" in keeper.failures.of("tiny")


async def test_one_that_takes_no_adapters_is_told_apart(database: Database, keepers: Make) -> None:
    keeper = keepers("plain")
    await want(database)
    await until(keeper, lambda: failed(keeper))
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in keeper.failures.of("tiny")


async def test_one_that_serves_too_short_a_context_is_not_registered(database: Database, keepers: Make) -> None:
    keeper = keepers()
    keeper.context = lambda model: 5000  # type: ignore[method-assign]
    await want(database)
    await until(keeper, lambda: failed(keeper))
    assert "up to 4096 tokens, 5000 are needed" in keeper.failures.of("tiny")


async def test_every_server_of_an_engine_has_a_row_and_dies_alone(database: Database, keepers: Make) -> None:
    keeper = keepers(servers=2)
    await want(database)

    async def both() -> bool:
        return len(await rows(database)) == 2

    await until(keeper, both)
    first, second = keeper.kept.values()
    assert first.url != second.url
    assert first.log != second.log
    assert first.child is not None
    os.killpg(first.child.pid, signal.SIGKILL)
    first.child.process.wait()
    await keeper.tick()
    assert [row.url for row in await rows(database)] == [second.url]
    await until(keeper, both)


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
    child = child_of(keeper)
    async with database.begin() as session:
        await session.execute(update(SamplerWant).values(wanted_until=1.0))
    await asyncio.sleep(0.06)
    await keeper.tick()
    assert await rows(database) == []
    assert child.poll() is not None


async def test_a_sampler_that_is_let_go_ends_though_the_database_refuses(
    database: Database, keepers: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = keepers()
    await want(database)
    await until(keeper, lambda: rows(database))
    child, kept = child_of(keeper), only(keeper)

    async def refuses(*_: Any, **__: Any) -> None:
        raise OperationalError("", {}, Exception("database is locked"))

    monkeypatch.setattr("workers.sampler.keeper.repository.remove", refuses)
    with pytest.raises(OperationalError):
        await keeper.forget(kept)
    assert child.poll() is not None
    monkeypatch.undo()


async def test_a_server_that_cannot_be_started_is_told_and_tried_again_later(
    database: Database, keepers: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "sampler-tiny.log")

    monkeypatch.setattr("workers.sampler.keeper.spawn_on_leash", refuses)
    keeper = keepers()
    await want(database)
    await keeper.tick()
    async with database.read() as session:
        assert "sampler-tiny.log" in (await session.scalar(select(SamplerWant.error)) or "")
    assert keeper.kept == {}


async def running(database: Database, keepers: Make, serves: str = "tiny", servers: int = 1) -> SmallKeeper:
    """Samplers that another keeper runs; this database knows none of them."""
    keeper = keepers(serves, servers)
    for server in range(servers):
        keeper.engine = keeper.small
        await keeper.start(Place("tiny", str(server)))
    for kept in keeper.kept.values():
        async with asyncio.timeout(20):
            while not await SamplerClient(keeper.http, kept.url).health():
                await asyncio.sleep(0.02)
    return keeper


async def test_each_url_that_serves_the_model_has_a_row_and_is_never_stopped(database: Database, keepers: Make) -> None:
    elsewhere = await running(database, keepers, servers=2)
    other = await running(database, keepers, "another")
    urls = [kept.url for kept in (*elsewhere.kept.values(), *other.kept.values())]
    keeper = keepers(sampler_urls=f" {urls[2]}, {urls[0]} ,{urls[1]}", sampler_data_dir="/shared/hone")
    await want(database)

    async def both() -> bool:
        return len(await rows(database)) == 2

    await until(keeper, both)
    found = await rows(database)
    assert {row.url for row in found} == set(urls[:2])
    assert {row.adapter_root for row in found} == {"/shared/hone"}
    assert not keeper.failures.count  # one that serves something else is no fault
    async with database.read() as session:
        assert await session.scalar(select(SamplerWant.error)) is None
    for kept in list(keeper.kept.values()):
        await keeper.forget(kept)
    assert all(kept.child is not None and kept.child.poll() is None for kept in elsewhere.kept.values())


async def test_urls_that_all_serve_something_else_are_named(database: Database, keepers: Make) -> None:
    other = await running(database, keepers, "another")
    keeper = keepers(sampler_urls=only(other).url)
    await want(database)

    async def told() -> str | None:
        async with database.read() as session:
            return await session.scalar(select(SamplerWant.error))

    await until(keeper, told)
    assert await told() == f"{only(other).url} serves another"


async def test_a_url_that_is_away_is_retried_and_found_when_it_comes(
    database: Database, keepers: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping_places, "BACK_OFF_S", (0.0,))
    elsewhere = await running(database, keepers)
    url = only(elsewhere).url
    os.killpg(child_of(elsewhere).pid, signal.SIGSTOP)
    monkeypatch.setattr(clients, "PROBE_TIMEOUT_S", 0.1)
    keeper = keepers(sampler_urls=url)
    await want(database)
    await until(keeper, lambda: failed(keeper))
    assert "does not answer" in keeper.failures.of("tiny")
    os.killpg(child_of(elsewhere).pid, signal.SIGCONT)
    await until(keeper, lambda: rows(database))
    assert (await rows(database))[0].url == url


async def test_no_engine_to_start_is_told_to_whoever_wants_one(
    database: Database, keepers: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = keepers()

    async def none() -> Engine:
        raise NoEngine("none was found: set HONE_VLLM_PYTHON")

    monkeypatch.setattr(keeper, "choose_engine", none)
    await want(database)
    await keeper.tick()
    async with database.read() as session:
        assert "HONE_VLLM_PYTHON" in (await session.scalar(select(SamplerWant.error)) or "")


async def test_a_beat_refreshes_only_what_answers(database: Database, keepers: Make) -> None:
    keeper = keepers()
    await want(database)
    await until(keeper, lambda: rows(database))
    async with database.begin() as session:
        await session.execute(update(Sampler).values(heartbeat=1.0))
    await keeper.beat()
    assert (await rows(database))[0].heartbeat > 1e9
    child = child_of(keeper)
    os.killpg(child.pid, signal.SIGKILL)
    child.process.wait()
    async with database.begin() as session:
        await session.execute(update(Sampler).values(heartbeat=1.0))
    await keeper.beat()
    assert (await rows(database))[0].heartbeat == 1.0
