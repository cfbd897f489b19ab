"""Model names of a project: base models, checkpoints, results of jobs.

Does not cover: what is done with the adapter.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.checkpoints.library import Reference
from app.checkpoints.store import CorruptCheckpoint
from app.core.errors import NotFound
from app.db import migrate
from app.db.engine import Database
from app.db.tables import Checkpoint, Job
from app.inference.resolution import KEEP_S, ModelBroken, Resolver
from app.models.catalogue import BaseModel, Catalogue
from app.rendering.protocol import ChatRenderer, NoRenderer
from app.samplers.service import Adapter

NAME = "ft:bytes:org-hone:shop:abc"


def job(job_id: str, **given: Any) -> Job:
    values = {
        "id": job_id,
        "project_id": "p",
        "status": "running",
        "model": "bytes",
        "training_file": "file-1",
        "seed": 1,
        "method": {},
        "options": {},
        "created_at": 1.0,
    }
    return Job(**{**values, **given})


def checkpoint(job_id: str, step: int, **given: Any) -> Checkpoint:
    values = {
        "id": f"ckpt-{job_id}-{step}",
        "project_id": "p",
        "job_id": job_id,
        "step": step,
        "attempt": 1,
        "name": f"{NAME}:ckpt-step-{step}",
        "base_model": "bytes",
        "path": f"/adapters/{step}",
        "sha256": "0",
        "metrics": {},
        "created_at": 1.0,
    }
    return Checkpoint(**{**values, **given})


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    url = f"sqlite+aiosqlite:///{tmp_path / 'hone.db'}"
    migrate.upgrade(url)
    made = Database(url)
    async with made.begin() as session:
        session.add(job("j1", fine_tuned_model=NAME, status="succeeded"))
        await session.flush()
        session.add_all([checkpoint("j1", 9), checkpoint("j1", 10)])
    yield made
    await made.close()


@pytest.fixture
def time() -> list[float]:
    return [0.0]


@pytest.fixture
def resolver(database: Database, base: BaseModel, renderer: ChatRenderer, time: list[float]) -> Resolver:
    return Resolver(database, Catalogue(base.path.parent), lambda _: renderer, as_named, clock=lambda: time[0])


def as_named(files: Reference) -> Path:
    return Path(files.path)


async def test_a_base_model_has_no_adapter(resolver: Resolver, base: BaseModel) -> None:
    target = await resolver.resolve("p", "bytes")
    assert (target.base, target.adapter) == (base, None)


async def test_a_checkpoint_is_its_own_adapter(resolver: Resolver) -> None:
    target = await resolver.resolve("p", f"{NAME}:ckpt-step-9")
    assert target.adapter == Adapter("ckpt-j1-9", "/adapters/9")


async def test_the_result_of_a_job_is_its_last_checkpoint(resolver: Resolver) -> None:
    target = await resolver.resolve("p", NAME)
    assert target.adapter == Adapter("ckpt-j1-10", "/adapters/10")


@pytest.mark.parametrize(
    ("project", "name"), [("p", "nothing"), ("p", "../bytes"), ("other", NAME), ("other", f"{NAME}:ckpt-step-9")]
)
async def test_what_a_project_does_not_have_does_not_exist(resolver: Resolver, project: str, name: str) -> None:
    with pytest.raises(NotFound) as caught:
        await resolver.resolve(project, name)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_a_name_is_looked_up_again_after_some_seconds(
    resolver: Resolver, database: Database, time: list[float]
) -> None:
    await resolver.resolve("p", NAME)
    async with database.begin() as session:
        session.add(checkpoint("j1", 11))
    kept = await resolver.resolve("p", NAME)
    time[0] = KEEP_S
    fresh = await resolver.resolve("p", NAME)
    assert [target.adapter and target.adapter.path for target in (kept, fresh)] == ["/adapters/10", "/adapters/11"]


async def test_a_model_is_there_the_moment_it_is_registered(resolver: Resolver, database: Database) -> None:
    with pytest.raises(NotFound):
        await resolver.resolve("p", "ft:new")
    async with database.begin() as session:
        session.add(checkpoint("j1", 12, name="ft:new"))
    assert (await resolver.resolve("p", "ft:new")).adapter is not None


async def test_a_tuned_model_without_its_base_names_the_base(resolver: Resolver, database: Database) -> None:
    async with database.begin() as session:
        session.add(checkpoint("j1", 13, name="ft:orphan", base_model="removed"))
    with pytest.raises(NotFound, match="`removed`"):
        await resolver.resolve("p", "ft:orphan")


async def test_a_model_that_cannot_be_rendered_is_an_operators_error(
    database: Database, base: BaseModel, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: BaseModel) -> ChatRenderer:
        raise NoRenderer(f"{base.path}: choose a renderer")

    resolver = Resolver(database, Catalogue(base.path.parent), fail, as_named)
    with pytest.raises(ModelBroken, match="`bytes`") as caught:
        await resolver.resolve("p", "bytes")
    assert str(base.path) not in caught.value.message
    assert f"{base.path}: choose a renderer" in caplog.text


async def test_files_that_are_not_what_was_trained_are_not_served(
    database: Database, base: BaseModel, renderer: ChatRenderer
) -> None:
    def refuse(files: Reference) -> Path:
        raise CorruptCheckpoint(f"{files.key} is damaged")

    resolver = Resolver(database, Catalogue(base.path.parent), lambda _: renderer, refuse)
    with pytest.raises(ModelBroken) as caught:
        await resolver.resolve("p", f"{NAME}:ckpt-step-9")
    assert "damaged" not in caught.value.message
    assert isinstance(caught.value.__cause__, CorruptCheckpoint)
    assert "j1/a1/step-9" in str(caught.value.__cause__)


async def test_a_slow_look_up_holds_up_its_own_name_only(
    database: Database, base: BaseModel, renderer: ChatRenderer
) -> None:
    calls, go_on = [], threading.Event()

    def slow(files: Reference) -> Path:
        calls.append(files.path)
        assert go_on.wait(10)
        return Path(files.path)

    resolver = Resolver(database, Catalogue(base.path.parent), lambda _: renderer, slow)
    waiting = [asyncio.create_task(resolver.resolve("p", NAME)) for _ in range(3)]
    assert (await asyncio.wait_for(resolver.resolve("p", "bytes"), 5)).adapter is None
    go_on.set()
    assert len({target.adapter for target in await asyncio.gather(*waiting)}) == 1
    assert calls == ["/adapters/10"]
