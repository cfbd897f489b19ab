"""A live server for the API tests: real migrations, real HTTP, the official client, a real key.

Does not cover: workers. Nothing runs a job here; tests that need its rows write them through `database`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from openai import AsyncOpenAI, OpenAI

from app.checkpoints import store
from app.core.settings import Settings
from app.db import migrate
from app.db.engine import Database
from app.db.tables import Checkpoint, Job
from app.rendering.registry import load_renderer
from app.rendering.tokens import TextTokenizer
from app.web.main import create_app
from tests.api.fake_sampler import FakeSampler, register, serving
from tests.api.live_server import LiveServer, create_key
from tests.unit.inference.model import make_byte_model

START_S = 20.0
TUNED = "ft:bytes:org-hone:shop:abc"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of an installation of its own; a variable of the developer's shell does not reach it."""
    for name in [name for name in os.environ if name.startswith("HONE_")]:
        monkeypatch.delenv(name)
    return Settings(data_dir=tmp_path / "data", max_file_bytes=4 * 1024**2)


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that the real migrations made, once; each server starts from a copy."""
    path = tmp_path_factory.mktemp("template") / "hone.db"
    migrate.upgrade(f"sqlite+aiosqlite:///{path}")
    return path


@pytest.fixture
def live_server(settings: Settings, migrated: Path) -> Iterator[LiveServer]:
    """The application under uvicorn in a thread, on a free port of the loopback, database migrated, one key made."""
    settings.root.mkdir(parents=True)
    shutil.copy(migrated, settings.root / "hone.db")
    api_key = asyncio.run(create_key(settings))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server = uvicorn.Server(uvicorn.Config(create_app(settings), log_config=None, lifespan="on", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="live-server")
        thread.start()
        deadline = time.monotonic() + START_S
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            assert server.started, "the server did not start"
            yield LiveServer(f"http://127.0.0.1:{listener.getsockname()[1]}", settings, api_key)
        finally:
            server.should_exit = True
            thread.join(START_S)
            assert not thread.is_alive(), "the server did not stop"


@pytest.fixture
async def other_key(live_server: LiveServer) -> str:
    """A key of another project, which must see nothing of ours."""
    return await create_key(live_server.settings, "proj_other")


@pytest.fixture
def client(live_server: LiveServer) -> Iterator[OpenAI]:
    """The official client without its retries, so that a test sees the first answer."""
    with OpenAI(base_url=live_server.base_url, api_key=live_server.api_key, max_retries=0, timeout=30) as made:
        yield made


@pytest.fixture
async def async_client(live_server: LiveServer) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=live_server.base_url, api_key=live_server.api_key, max_retries=0, timeout=30
    ) as made:
        yield made


@pytest.fixture
def http(live_server: LiveServer) -> Iterator[httpx.Client]:
    """Raw HTTP with the key set, for what the official client cannot send."""
    headers = {"authorization": f"Bearer {live_server.api_key}"}
    with httpx.Client(base_url=live_server.url, headers=headers, timeout=30) as made:
        yield made


@pytest.fixture
async def database(live_server: LiveServer) -> AsyncIterator[Database]:
    """A second connection to the server's database, to put rows there that a worker would write."""
    made = Database(live_server.settings.database)
    yield made
    await made.close()


@pytest.fixture
def silent(settings: Settings, live_server: LiveServer) -> Iterator[FakeSampler]:
    """A sampler that runs and that nobody has registered."""
    base = make_byte_model(settings.models_dir / "bytes")
    encode = TextTokenizer.load(base.path, name=base.id).encode
    with serving(FakeSampler("bytes", encode, load_renderer(base).stop_token_ids[0])) as made:
        yield made


@pytest.fixture
async def sampler(silent: FakeSampler, database: Database) -> FakeSampler:
    await register(database, silent, "smp-1")
    return silent


@pytest.fixture
async def tuned(database: Database, settings: Settings) -> str:
    """A finished job with two checkpoints; the name of its result."""
    common = {"project_id": "proj_default", "created_at": 1.0}
    async with database.begin() as session:
        session.add(
            Job(
                id="ftjob-1", status="succeeded", model="bytes", training_file="file-1", seed=1, method={}, options={},
                fine_tuned_model=TUNED, **common,
            )
        )  # fmt: skip
        await session.flush()
        for step in (4, 8):
            path, sha256 = write_checkpoint(settings, step)
            session.add(
                Checkpoint(
                    id=f"ckpt-{step}", job_id="ftjob-1", step=step, attempt=1, name=f"{TUNED}:ckpt-step-{step}",
                    base_model="bytes", path=path, sha256=sha256, metrics={}, **common,
                )
            )  # fmt: skip
    return TUNED


def write_checkpoint(settings: Settings, step: int) -> tuple[str, str]:
    """Directory and digest of a checkpoint of `tuned`, whose weights are nobody's."""
    adapter, target = settings.root / f"adapter-{step}", settings.checkpoints_dir / store.key_of("ftjob-1", 1, step)
    adapter.mkdir(exist_ok=True)
    for name in store.ADAPTER_FILES:
        (adapter / name).write_text(f"{name} of step {step}")
    return str(target), store.publish(adapter, target, {"step": step})
