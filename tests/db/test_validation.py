"""A new job's files are read under a lease: queued with a plan, or failed with every bad row. Real files, no HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text, update

from app.core.settings import Settings
from app.db.engine import Database, create_sync
from app.db.tables import DEFAULT_PROJECT, Event, Job
from app.jobs import leases, service
from app.jobs.plan import Plan
from app.jobs.validation_service import validate_job
from app.models.catalogue import BaseModel, Catalogue
from app.rendering.protocol import MessageNotRenderable, NoRenderer
from tests.db.rows import Seed, dataset

MODEL = BaseModel(
    id="tiny",
    path=Path("/models/tiny"),
    renderer="hermes",
    context=64,
    lora_targets=("q_proj",),
    base_learning_rate=1e-4,
    lora_rank=8,
    licence="Apache-2.0",
    hub_id=None,
    created=0,
)


class OneModel(Catalogue):
    def get(self, model_id: str) -> BaseModel:
        return MODEL


class OneTokenAWord:
    """A renderer as far as validation uses one."""

    def prompt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[int]:
        words = " ".join(message["content"] for message in messages).split()
        if "unreadable" in words:
            raise MessageNotRenderable("messages.0.content", "cannot be rendered")
        return [0] * len(words)


def load(model: BaseModel) -> Any:
    return OneTokenAWord()


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    return OneModel(tmp_path)


async def after(database: Database, job_id: str) -> tuple[Job, list[Event]]:
    async with database.read() as session:
        job = (await service.view(session, DEFAULT_PROJECT, job_id)).job
        page = await service.list_events(session, DEFAULT_PROJECT, job_id, after=None, limit=100, ascending=True)
    return job, list(page.items)


async def test_right_files_queue_the_job_with_its_plan(
    database: Database, settings: Settings, seed: Seed, catalogue: Catalogue
) -> None:
    train, valid = await seed.file(dataset(16)), await seed.file(dataset(4, start=100))
    job_id = await seed.job(training_file=train, validation_file=valid)
    await validate_job(database, settings, catalogue, job_id, "runner", load=load)
    job, story = await after(database, job_id)
    assert job.status == "queued"
    assert job.error is None
    plan = Plan.from_dict(job.plan or {})
    assert (plan.train_rows, plan.valid_rows, plan.seed) == (16, 4, 7)
    assert job.total_steps == plan.total_steps
    assert [event.message for event in story] == [
        f"Validating training file: {train} and validation file: {valid}",
        "Files validated, moving job to queued state",
    ]


async def test_bad_rows_fail_the_job_and_stand_in_one_event(
    database: Database, settings: Settings, seed: Seed, catalogue: Catalogue
) -> None:
    train = await seed.file(dataset(12) + b'\nnonsense\n{"answer": "1"}')
    job_id = await seed.job(training_file=train, validation_file=await seed.file(dataset(4)))
    await validate_job(database, settings, catalogue, job_id, "runner", load=load)
    job, story = await after(database, job_id)
    assert job.status == "failed"
    assert job.finished_at is not None
    assert job.error is not None
    assert job.error["code"] == "invalid_training_file"
    assert job.error["param"] == "training_file"
    assert story[-1].level == "error"
    assert story[-1].data is not None
    assert [(p["row"], p["field"]) for p in story[-1].data["problems"]] == [(13, None), (14, "messages")]


async def test_too_few_rows_fail_the_job(
    database: Database, settings: Settings, seed: Seed, catalogue: Catalogue
) -> None:
    job_id = await seed.job(training_file=await seed.file(dataset(9)), validation_file=await seed.file(dataset(4)))
    await validate_job(database, settings, catalogue, job_id, "runner", load=load)
    job, _ = await after(database, job_id)
    assert job.error == {
        "code": "invalid_n_examples",
        "message": "Training file has 9 example(s), must have at least 10",
        "param": "training_file",
    }


async def test_a_file_that_is_gone_fails_the_job(
    database: Database, settings: Settings, seed: Seed, catalogue: Catalogue
) -> None:
    job_id = await seed.job(training_file=await seed.file(dataset(10)), validation_file="file-missing")
    await validate_job(database, settings, catalogue, job_id, "runner", load=load)
    job, _ = await after(database, job_id)
    assert job.error is not None
    assert job.error["code"] == "invalid_validation_file"


async def test_rows_in_both_files_are_a_warning(
    database: Database, settings: Settings, seed: Seed, catalogue: Catalogue
) -> None:
    job_id = await seed.job(training_file=await seed.file(dataset(10)), validation_file=await seed.file(dataset(4)))
    await validate_job(database, settings, catalogue, job_id, "runner", load=load)
    job, story = await after(database, job_id)
    assert job.status == "queued"
    assert story[-2].level == "warn"
    assert story[-2].message.startswith("4 of 4 validation rows")


async def test_a_job_that_someone_else_reads_is_left_alone(
    database: Database, settings: Settings, seed: Seed, catalogue: Catalogue
) -> None:
    job_id = await seed.job()
    async with database.begin() as session:
        await leases.claim_validation(session, job_id, "other")
    await validate_job(database, settings, catalogue, job_id, "runner", load=load)
    job, story = await after(database, job_id)
    assert (job.status, job.lease_owner, story) == ("validating_files", "other", [])


async def test_a_job_cancelled_while_it_is_read_stays_cancelled(
    database: Database, settings: Settings, seed: Seed, tmp_path: Path
) -> None:
    job_id = await seed.job(training_file=await seed.file(dataset(10)), validation_file=await seed.file(dataset(4)))

    class CancelsFirst(Catalogue):
        def get(self, model_id: str) -> BaseModel:
            engine = create_sync(settings.database)
            with engine.begin() as connection:
                connection.execute(text("UPDATE jobs SET status = 'cancelled', attempt = 1, lease_owner = NULL"))
            engine.dispose()
            return MODEL

    await validate_job(database, settings, CancelsFirst(tmp_path), job_id, "runner", load=load)
    job, _ = await after(database, job_id)
    assert (job.status, job.plan) == ("cancelled", None)


async def test_rows_that_the_model_cannot_read_or_hold_are_named(
    database: Database, settings: Settings, seed: Seed, catalogue: Catalogue
) -> None:
    texts = ["fits " * 63, "long " * 64, "unreadable"]
    rows = [{"messages": [{"role": "user", "content": text}], "answer": "1"} for text in texts]
    valid = await seed.file("\n".join(json.dumps(row) for row in rows).encode())
    job_id = await seed.job(training_file=await seed.file(dataset(10)), validation_file=valid)
    await validate_job(database, settings, catalogue, job_id, "runner", load=load)
    job, story = await after(database, job_id)
    assert job.error is not None
    assert job.error["code"] == "invalid_validation_file"
    assert story[-1].data is not None
    assert [(p["row"], p["field"]) for p in story[-1].data["problems"]] == [(2, "messages"), (3, "messages.0.content")]
    assert "64 tokens" in job.error["message"]


async def test_a_model_without_a_renderer_fails_the_job(
    database: Database, settings: Settings, seed: Seed, catalogue: Catalogue
) -> None:
    def none(model: BaseModel) -> Any:
        raise NoRenderer("no renderer is known")

    job_id = await seed.job()
    await validate_job(database, settings, catalogue, job_id, "runner", load=none)
    job, _ = await after(database, job_id)
    assert job.error == {"code": "model_not_usable", "message": "no renderer is known", "param": "model"}


async def test_a_bug_of_ours_fails_the_job_instead_of_coming_back_for_ever(
    database: Database, settings: Settings, seed: Seed, catalogue: Catalogue
) -> None:
    def broken(model: BaseModel) -> Any:
        raise KeyError("oops")

    job_id = await seed.job()
    await validate_job(database, settings, catalogue, job_id, "runner", load=broken)
    job, _ = await after(database, job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "internal_error"


async def test_a_file_that_was_changed_in_storage_fails_the_job(
    database: Database, settings: Settings, seed: Seed, catalogue: Catalogue
) -> None:
    train, valid = await seed.file(dataset(16)), await seed.file(dataset(4, start=100))
    (settings.files_dir / valid).write_bytes(dataset(4, start=101))
    job_id = await seed.job(training_file=train, validation_file=valid)
    await validate_job(database, settings, catalogue, job_id, "runner", load=load)
    job, _ = await after(database, job_id)
    assert job.error is not None
    assert (job.status, job.error["code"]) == ("failed", "invalid_validation_file")
    assert "can no longer be read" in job.error["message"]


async def test_while_storage_is_away_the_job_waits_and_nothing_is_held_against_it(
    database: Database, settings: Settings, seed: Seed, catalogue: Catalogue
) -> None:
    (settings.root / "no folder").touch()
    away = settings.model_copy(update={"storage_url": str(settings.root / "no folder" / "below")})
    train, valid = await seed.file(dataset(16)), await seed.file(dataset(4, start=100))
    job_id = await seed.job(training_file=train, validation_file=valid)
    await validate_job(database, away, catalogue, job_id, "runner", load=load)
    job, _ = await after(database, job_id)
    assert (job.status, job.error, job.lease_owner) == ("validating_files", None, "runner")
    async with database.begin() as session:
        await session.execute(update(Job).values(lease_until=0.0))
    await validate_job(database, settings, catalogue, job_id, "another", load=load)
    assert (await after(database, job_id))[0].status == "queued"
