"""What `GET /metrics` and `GET /readyz` ask of a database, on both kinds."""

from __future__ import annotations

from sqlalchemy import select, text, update

from app.core.settings import Settings
from app.db.engine import Database, now
from app.db.tables import Event, Job, Rollout
from app.files.storage import Storage
from app.web import figures, readiness

COMMON = {"project_id": "p"}


def job(id: str, status: str, seconds: dict[str, float]) -> Job:
    needed = {"model": "m", "training_file": "file-1", "seed": 1, "method": {}, "options": {}, "created_at": 1.0}
    return Job(id=id, status=status, seconds=seconds, **COMMON, **needed)


async def read(database: Database) -> figures.Figures:
    async with database.read() as session:
        return await figures.read(session)


async def test_an_empty_service_shows_every_status_at_zero(database: Database) -> None:
    found = await read(database)
    assert set(found.jobs.values()) == set(found.rollouts.values()) == {0}
    assert (found.queue_age_s, found.expired_leases, found.samplers_wanted) == (0.0, 0, 0)


async def test_open_jobs_are_added_up_and_ended_ones_left_out(database: Database) -> None:
    async with database.begin() as session:
        session.add_all([job("a", "running", {"tools": 1.0}), job("b", "paused", {"tools": 2.0, "grading": 4.0})])
        session.add(job("c", "failed", {"tools": 100.0}))
        await session.flush()
        for of in "abc":
            session.add(
                Rollout(
                    id=of, job_id=of, attempt=1, step=1, split="train", row=0, group=0, sample=0, version=0,
                    state="lost", started_at=1.0, finished_at=2.0, **COMMON,
                )
            )  # fmt: skip
    found = await read(database)
    assert found.rollouts["lost"] == 2
    assert dict(found.phase_seconds) == {"tools": 3.0, "grading": 4.0}
    assert (found.jobs["failed"], found.jobs["queued"]) == (1, 0)


async def test_the_head_of_the_queue_is_the_job_without_news_for_longest(database: Database) -> None:
    async with database.begin() as session:
        stamp = await session.scalar(select(now())) or 0.0
        for id, age in (("a", 50), ("b", 200)):
            session.add(job(id, "queued", {}))
            await session.flush()
            for number, past in enumerate((9000, age)):
                session.add(
                    Event(
                        id=f"{id}{number}", job_id=id, created_at=stamp - past, level="info", type="message",
                        message="", **COMMON,
                    )
                )  # fmt: skip
    assert 200 <= (await read(database)).queue_age_s < 260
    async with database.begin() as session:
        await session.execute(update(Job).where(Job.id == "b").values(status="paused"))
    assert 50 <= (await read(database)).queue_age_s < 110


async def test_ready_means_migrated(database: Database, settings: Settings) -> None:
    ready = readiness.of_service(database, Storage(settings.files_dir))
    assert await ready.missing() == {}
    async with database.begin() as session:
        await session.execute(text("DROP TABLE alembic_version"))
    assert list(await ready.missing()) == ["migration"]
