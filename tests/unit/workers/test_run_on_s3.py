"""A whole attempt with storage in S3: what the job leaves is read on a host that has none of the worker's disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from app.checkpoints import store
from app.checkpoints.library import Library
from app.core.settings import Settings
from app.db.tables import DEFAULT_PROJECT, Checkpoint, File, Job, Rollout
from app.files import service as files
from app.files.storage import Storage
from app.inference.repository import find_tuned
from app.jobs import service
from app.rollouts import service as rollouts
from app.rollouts.traces import Traces
from app.storage.errors import StorageUnavailable
from tests import s3 as real
from tests.unit.storage.conftest import s3
from tests.unit.workers.test_run import FakeTrainer, Stage, stage
from workers import storing

__all__ = ["s3", "stage"]


@pytest.fixture
def settings(s3: real.S3, tmp_path: Path) -> Settings:
    return s3.settings(tmp_path / "data")


def elsewhere(settings: Settings, folder: Path) -> Settings:
    """Another host: the same storage, an empty disk."""
    return Settings(data_dir=folder, storage_url=settings.storage_url, storage_options=settings.storage_options)


async def test_what_a_job_leaves_is_read_on_another_host(stage: Stage, tmp_path: Path) -> None:
    run = await stage.attempt(FakeTrainer())
    assert await stage.end_of(run) is None
    for gone in ("files", "checkpoints", "traces"):
        shutil.rmtree(stage.settings.root / gone)
    there = elsewhere(stage.settings, tmp_path / "there")

    async with stage.database.read() as session:
        tuned = await find_tuned(session, DEFAULT_PROJECT, run.final_name)
        (job,) = (await session.scalars(select(Job))).all()
        (result,) = (await session.scalars(select(File).where(File.id == job.result_files[0]))).all()
    assert tuned is not None
    assert store.verify(Library.of(there).locate(tuned.files)) == tuned.files.sha256
    with await files.content(Storage.of(there), result) as content:
        assert content.read().startswith(b"step,")
    ended = await stage.all_of(Rollout)
    assert len(ended) > 20
    traces = Traces.of(there)
    for rollout in ended:
        shown = await rollouts.with_trace(rollout, traces)
        assert shown.trace is not None, shown.trace_error
        assert shown.trace["id"] == rollout.id


async def test_a_store_that_stays_away_pauses_the_job_and_a_resume_ends_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = store.upload

    def away(*given: Any) -> None:
        raise StorageUnavailable("s3://bucket/p", "no answer in time")

    monkeypatch.setattr(storing, "PATIENCE_S", 0.0)
    monkeypatch.setattr(store, "upload", away)
    assert isinstance(await stage.end_of(await stage.attempt(FakeTrainer())), StorageUnavailable)
    (job,) = await stage.all_of(Job)
    assert (job.status, job.crashes, await stage.all_of(Checkpoint)) == ("paused", 0, [])
    assert "storage at s3://bucket/p: no answer in time" in job.activity

    monkeypatch.setattr(store, "upload", upload)
    async with stage.database.begin() as session:
        await service.resume(session, job.project_id, job.id)
    assert await stage.end_of(await stage.attempt(FakeTrainer())) is None
    assert [row.step for row in await stage.all_of(Checkpoint)] == [1, 2, 3]


async def test_a_changed_training_file_fails_the_job_before_a_rollout(
    stage: Stage, settings: Settings, tmp_path: Path
) -> None:
    (job,) = await stage.all_of(Job)
    (tmp_path / "changed").write_bytes(b'{"messages": []}\n')
    real.open_remote(settings, "files").put(tmp_path / "changed", job.training_file)
    await stage.end_of(await stage.attempt(FakeTrainer()))
    (job,) = await stage.all_of(Job)
    assert (job.status, job.error["code"], job.error["param"]) == ("failed", "invalid_training_file", "training_file")
    assert await stage.all_of(Rollout) == []
