"""What no row names goes once it is old, over real directories; what a row, a pin or a live attempt needs stays."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from app.core.settings import Settings
from app.db.engine import Database, now
from app.db.tables import DEFAULT_PROJECT, AdapterPin, Job, Sampler, SamplerAdapter, Snapshot
from app.samplers.service import PIN_S
from tests.db.rows import Seed
from workers import unnamed
from workers.collection import Collector
from workers.janitor import Janitor

OLD_S = 7 * 86400.0


@pytest.fixture
def collector(database: Database, settings: Settings) -> Collector:
    return Collector(settings, database)


def old(path: Path, text: str | None = None, *, age_s: float = OLD_S) -> Path:
    """A directory with a file in it, or a file with `text`, as it lies there after a week."""
    if text is None:
        path.mkdir(parents=True)
        (path / "file").write_text("bytes")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    _age(path, age_s)
    return path


def _age(path: Path, age_s: float = OLD_S) -> None:
    at = time.time() - age_s
    for each in [path, *path.rglob("*"), *path.parents[:4]]:
        os.utime(each, (at, at), follow_symlinks=False)


async def _row(database: Database, *rows: Any) -> None:
    async with database.begin() as session:
        for row in rows:
            session.add(row)
            await session.flush()


def snapshot_of(job_id: str, attempt: int, step: int, path: str) -> Snapshot:
    return Snapshot(
        project_id=DEFAULT_PROJECT, job_id=job_id, step=step, attempt=attempt, path=path, sha256="x", cursor={},
        created_at=now(),
    )  # fmt: skip


def sampler(adapter: Path | None = None, *, heartbeat: Any = None) -> list[Any]:
    made: list[Any] = [
        Sampler(
            id="s1",
            project_id=DEFAULT_PROJECT,
            base_model="tiny",
            url="http://x",
            host="h",
            adapter_root="",
            info={},
            max_loras=8,
            started_at=1.0,
            heartbeat=now() if heartbeat is None else heartbeat,
        )
    ]
    if adapter is not None:
        made.append(
            SamplerAdapter(
                sampler_id="s1",
                name=adapter.name,
                project_id=DEFAULT_PROJECT,
                path=str(adapter),
                loaded_at=1.0,
                last_used=1.0,
            )
        )
    return made


async def test_of_a_job_that_waits_only_what_it_resumes_from_stays(
    collector: Collector, seed: Seed, settings: Settings, database: Database
) -> None:
    job_id = await seed.job(status="queued", attempt=3)
    base = settings.jobs_dir / job_id
    kept = old(base / "a2" / "snapshots" / "step-5")
    gone = [
        old(base / "a1"), old(base / "a3"), old(base / "a2" / "batches"), old(base / "a2" / "snapshots" / "step-4"),
        old(base / "a2" / "snapshots" / "step-6.tmp-0a1b2c3d"),
    ]  # fmt: skip
    await _row(database, snapshot_of(job_id, 2, 5, f"/another/mount/jobs/{job_id}/a2/snapshots/step-5"))
    done = await collector.collect()
    assert (done.directories, done.failed) == (5, 0)
    assert kept.exists()
    assert not any(path.exists() for path in gone)


async def test_nothing_of_a_running_attempt_is_touched(collector: Collector, seed: Seed, settings: Settings) -> None:
    job_id = await seed.job(status="running", attempt=2, lease_owner="w", lease_until=1.0)
    kept = [
        old(settings.jobs_dir / job_id / "a2" / "snapshots" / "step-1.tmp-0a1b2c3d"),
        old(settings.adapters_dir / job_id / f"{job_id}-a2-v1"),
        old(settings.checkpoints_dir / job_id / "a2" / "step-1"),
        old(settings.jobs_dir / job_id / "a3"),  # of a newer database than this
    ]
    gone = [
        old(settings.jobs_dir / job_id / "a1"),
        old(settings.adapters_dir / job_id / f"{job_id}-a1-v7"),
        old(settings.checkpoints_dir / job_id / "a1" / "step-1"),
    ]
    assert (await collector.collect()).directories == 3
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)


async def test_what_is_young_stays(collector: Collector, seed: Seed, settings: Settings) -> None:
    job_id = await seed.job(status="queued", attempt=1)
    young = old(settings.jobs_dir / job_id / "a1")
    (young / "file").touch()
    assert (await collector.collect()).directories == 0
    assert young.exists()


async def test_a_job_that_is_over_leaves_its_checkpoints_alone(
    collector: Collector, seed: Seed, settings: Settings, database: Database
) -> None:
    job_id = await seed.job(status="succeeded", attempt=1, finished_at=1.0)
    await seed.checkpoint(job_id, 4)
    kept = old(settings.checkpoints_dir / job_id / "a1" / "step-4")
    gone = [
        old(settings.checkpoints_dir / job_id / "a1" / "step-8"),
        old(settings.checkpoints_dir / job_id / "a1" / "step-4.tmp-123"),
        old(settings.jobs_dir / job_id / "a1" / "snapshots" / "step-8"),
        old(settings.adapters_dir / job_id / f"{job_id}-a1-v8-r1"),
    ]
    await _row(database, snapshot_of(job_id, 1, 8, str(gone[2])))
    done = await collector.collect()
    assert (done.directories, done.rows) == (4, 1)
    assert kept.exists()
    assert not any(path.exists() for path in gone)
    assert not (settings.jobs_dir / job_id).exists()


async def test_a_job_that_has_just_ended_keeps_everything(collector: Collector, seed: Seed, settings: Settings) -> None:
    job_id = await seed.job(status="running", attempt=1)
    path = old(settings.jobs_dir / job_id / "a1")
    async with seed.database.begin() as session:
        ended = {"status": "cancelled", "attempt": 2, "finished_at": now()}
        await session.execute(update(Job).where(Job.id == job_id).values(**ended))
    _age(path, 60.0)  # its last file is younger than the grace time, too
    await collector.collect()
    assert path.exists()


async def test_a_job_that_the_database_does_not_know_is_left_alone(collector: Collector, settings: Settings) -> None:
    """It was pointed at another database, or an older one was put back: nothing here says what is needed."""
    unknown = "ftjob-AAAAAAAAAAAAAAAAAAAAAAAA"
    kept = [
        old(settings.jobs_dir / unknown / "a1"), old(settings.adapters_dir / unknown / f"{unknown}-a1-v1"),
        old(settings.checkpoints_dir / unknown / "a1" / "step-1"),
        old(settings.logs_dir / f"{unknown}.trainer.log", "x"), old(settings.jobs_dir / "notes of the operator"),
    ]  # fmt: skip
    assert (await collector.collect()).directories == 0
    assert all(path.exists() for path in kept)


async def test_a_version_that_a_sampler_has_loaded_stays_until_that_sampler_is_gone(
    collector: Collector, seed: Seed, settings: Settings, database: Database
) -> None:
    job_id = await seed.job(status="cancelled", attempt=2, finished_at=1.0)
    loaded = old(settings.adapters_dir / job_id / f"{job_id}-a1-v1")
    await _row(database, *sampler(loaded))
    assert (await collector.collect()).directories == 0
    async with database.begin() as session:
        await session.execute(update(Sampler).values(heartbeat=now() - OLD_S))
    assert (await collector.collect()).directories == 1
    assert not loaded.exists()


async def test_a_live_pin_holds_a_version_whatever_its_sampler_says(
    collector: Collector, seed: Seed, settings: Settings, database: Database
) -> None:
    job_id = await seed.job(status="cancelled", attempt=2, finished_at=1.0)
    pinned = old(settings.adapters_dir / job_id / f"{job_id}-a1-v1")
    pin = AdapterPin(
        sampler_id="s1", name=pinned.name, holder="chat", project_id=DEFAULT_PROJECT, pinned_until=now() + PIN_S
    )
    await _row(database, *sampler(pinned, heartbeat=1.0), pin)
    assert (await collector.collect()).directories == 0
    async with database.begin() as session:
        await session.execute(update(AdapterPin).values(pinned_until=now() - 1))
    assert (await collector.collect()).directories == 1


async def test_no_link_is_followed(collector: Collector, seed: Seed, settings: Settings, tmp_path: Path) -> None:
    over = await seed.job(status="failed", attempt=1, finished_at=1.0)
    waits = await seed.job(status="queued", attempt=1)
    treasure = old(tmp_path / "elsewhere" / "a1")
    for link in (settings.jobs_dir / over, settings.jobs_dir / waits / "a1", settings.adapters_dir / over):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(treasure.parent, target_is_directory=True)
        _age(link)
    inside = old(settings.checkpoints_dir / over / "a1" / "step-1")
    (inside / "link").symlink_to(treasure)
    _age(inside)
    assert (await collector.collect()).directories == 1
    assert (treasure / "file").read_text() == "bytes"


def test_a_path_that_a_link_leads_elsewhere_is_refused(settings: Settings, tmp_path: Path) -> None:
    """As if it was put there between the look and the removal."""
    treasure = old(tmp_path / "elsewhere" / "a1")
    settings.jobs_dir.mkdir(parents=True)
    (settings.jobs_dir / "ftjob-A").symlink_to(treasure.parent)
    with pytest.raises(unnamed.Outside):
        unnamed.remove(unnamed.Unnamed(settings.jobs_dir, settings.jobs_dir / "ftjob-A" / "a1", 0))
    assert treasure.exists()


async def test_logs_of_ended_jobs_go_by_age(collector: Collector, seed: Seed, settings: Settings) -> None:
    over = await seed.job(status="succeeded", attempt=1, finished_at=1.0)
    paused = await seed.job(status="paused", attempt=1)
    ages = {f"{over}.trainer.log": 31, f"{over}.supervisor.log": 29, f"{paused}.trainer.log": 400, "runner.log": 400}
    logs = {name: old(settings.logs_dir / name, "line", age_s=days * 86400.0) for name, days in ages.items()}
    await collector.collect()
    assert [name for name, path in logs.items() if not path.exists()] == [f"{over}.trainer.log"]


async def test_what_cannot_be_removed_does_not_keep_the_rest(
    collector: Collector, seed: Seed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await seed.job(status="queued", attempt=2)
    first, second = old(settings.jobs_dir / job_id / "a1"), old(settings.jobs_dir / job_id / "a2")
    rmtree = shutil.rmtree

    def refusing(path: Path) -> None:
        if path == first:
            raise PermissionError(13, "not yours")
        rmtree(path)

    monkeypatch.setattr("workers.unnamed.shutil.rmtree", refusing)
    done = await collector.collect()
    assert (done.directories, done.failed) == (1, 1)
    assert first.exists()
    assert not second.exists()


async def test_objects_of_checkpoints_go_when_their_job_is_over(
    seed: Seed, settings: Settings, database: Database, tmp_path: Path
) -> None:
    over = await seed.job(status="succeeded", attempt=2, finished_at=1.0)
    paused = await seed.job(status="paused", attempt=2)
    await seed.checkpoint(over, 4)
    store = tmp_path / "store"
    for job_id in (over, paused):
        for place in ("a1/step-4", "a1/step-8"):
            old(store / "checkpoints" / job_id / place / "manifest.json", "{}")
    elsewhere = settings.model_copy(update={"storage_url": str(store)})
    assert (await Collector(elsewhere, database).collect()).objects == 1
    left = sorted(path.parent.relative_to(store / "checkpoints") for path in store.rglob("manifest.json"))
    assert left == sorted(Path(job, place) for job, place in [
        (over, "a1/step-4"), (paused, "a1/step-4"), (paused, "a1/step-8"),
    ])  # fmt: skip


async def test_copies_of_checkpoints_go_when_nobody_asked_for_them_lately_and_no_sampler_has_them(
    collector: Collector, seed: Seed, settings: Settings, database: Database
) -> None:
    running = await seed.job(status="running", attempt=2)
    for step in (4, 5, 6):
        await seed.checkpoint(running, step)
    attempt = settings.checkpoint_copies_dir / running / "a1"
    forgotten, loaded = old(attempt / "step-4"), old(attempt / "step-5")
    draft, partial = old(attempt / ".step-4.0a1b"), old(settings.incoming_dir / "tmpx", "half a file")
    asked_for = old(attempt / "step-6")
    os.utime(asked_for)  # as the library does
    fetching = old(settings.incoming_dir / "tmpy", "half a file", age_s=1)
    await _row(database, *sampler(loaded))
    assert (await collector.collect()).directories == 3
    assert not any(path.exists() for path in (forgotten, draft, partial))
    assert all(path.exists() for path in (loaded, asked_for, fetching))


async def test_the_housekeeping_loop_collects(seed: Seed, settings: Settings) -> None:
    job_id = await seed.job(status="paused", attempt=1)
    path = old(settings.jobs_dir / job_id / "a1")
    janitor = Janitor(settings)
    await janitor.tick()
    assert janitor.collector._round is not None
    await asyncio.wait_for(janitor.collector._round, 10)
    assert not path.exists()
    await janitor.shut_down()


async def test_one_of_several_has_the_turn_and_a_kick_is_cheap(
    seed: Seed, settings: Settings, database: Database
) -> None:
    job_id = await seed.job(status="queued", attempt=1)
    path = old(settings.jobs_dir / job_id / "a1")
    first, second = Collector(settings, database), Collector(settings, database)
    for _ in range(3):
        first.kick()
    assert first._round is not None
    await first._round
    assert not path.exists()
    assert await second.collect_if_due() is None
    await first.close()
    await second.close()
