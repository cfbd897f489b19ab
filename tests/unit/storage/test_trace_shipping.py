"""Traces on their way from a worker's disk to storage, and out of it when there are too many."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.core.settings import Settings
from app.rollouts.traces import TraceMissing, Traces, append_trace
from app.storage.base import ObjectStore
from app.storage.build import open_store
from app.storage.errors import StorageUnavailable
from workers.rollouts import shipping as module
from workers.rollouts.shipping import Shipping

JOB = "ftjob-1"
ELSEWHERE = pytest.mark.parametrize("settings", ["memory", "s3"], indirect=True)


@pytest.fixture
def store(settings: Settings) -> ObjectStore:
    return open_store(settings, "traces")


@pytest.fixture
def write(settings: Settings) -> Callable[..., Any]:
    """A trace of a step, as the recorder writes it; what a row would keep of it."""

    def one(step: int, attempt: int = 2, valid: bool = False, text: str = "") -> tuple[str, int, int]:
        file = f"{JOB}/a{attempt}/step-{step}{'-valid' if valid else ''}.jsonl.zst"
        return file, *append_trace(settings.traces_dir / file, {"n": step, "text": text})

    return one


def made(settings: Settings, store: ObjectStore, limit: int = 0) -> Shipping:
    return Shipping(store, settings.traces_dir, JOB, 2, limit)


def names(store: ObjectStore) -> list[str]:
    return [entry.key.removeprefix(f"{JOB}/").removesuffix(".jsonl.zst") for entry in store.entries()]


def elsewhere(settings: Settings, tmp_path: Path) -> Traces:
    """The API of a host without the worker's disk."""
    given = {"storage_url": settings.storage_url, "storage_options": settings.storage_options}
    return Traces.of(Settings(data_dir=tmp_path / "other", **given))


@ELSEWHERE
async def test_a_trace_is_read_on_another_host_once_its_step_is_done(
    settings: Settings, store: ObjectStore, write: Callable[..., Any], tmp_path: Path
) -> None:
    done, running = write(1), write(2)
    await made(settings, store).ship(1)
    there = elsewhere(settings, tmp_path)
    assert there.read(*done)["n"] == 1
    with pytest.raises(TraceMissing):
        there.read(*running)
    assert Traces.of(settings).read(*running)["n"] == 2


@ELSEWHERE
async def test_validation_runs_beside_the_next_step_and_is_stored_after_it(
    settings: Settings, store: ObjectStore, write: Callable[..., Any]
) -> None:
    shipping = made(settings, store)
    for step in (0, 1):
        write(step, valid=True)
    await shipping.ship(1)
    assert names(store) == ["a2/step-0-valid"]
    await shipping.finish(over=False)
    assert names(store) == ["a2/step-0-valid", "a2/step-1-valid"]


@ELSEWHERE
async def test_a_file_that_grew_after_its_step_is_stored_again(
    settings: Settings, store: ObjectStore, write: Callable[..., Any], tmp_path: Path
) -> None:
    shipping = made(settings, store)
    write(1)
    await shipping.ship(1)
    late = write(1, text="late")
    await shipping.ship(2)
    assert elsewhere(settings, tmp_path).read(*late)["text"] == "late"


@ELSEWHERE
async def test_what_a_dead_attempt_left_on_this_disk_is_stored_too(
    settings: Settings, store: ObjectStore, write: Callable[..., Any]
) -> None:
    write(5, attempt=1)
    await made(settings, store).ship(3)
    assert names(store) == ["a1/step-5"]


@ELSEWHERE
async def test_copies_go_when_the_job_is_over(
    settings: Settings, store: ObjectStore, write: Callable[..., Any]
) -> None:
    place = write(1)
    await made(settings, store).finish(over=False)
    assert (settings.traces_dir / place[0]).exists()
    await made(settings, store).finish(over=True)
    assert not (settings.traces_dir / place[0]).exists()
    assert Traces.of(settings).read(*place)["n"] == 1


@pytest.mark.parametrize("settings", ["folder"], indirect=True)
async def test_in_a_folder_the_files_are_where_they_belong(
    settings: Settings, store: ObjectStore, write: Callable[..., Any]
) -> None:
    place = write(1)
    await made(settings, store).finish(over=True)
    assert Traces.of(settings).read(*place)["n"] == 1


async def test_the_oldest_steps_go_first_and_the_newest_stays(
    settings: Settings, store: ObjectStore, write: Callable[..., Any]
) -> None:
    places = {step: write(step, text="x" * 10) for step in (10, 2, 9)}
    shipping = made(settings, store, limit=sum(place[2] for place in places.values()) - 1)
    await shipping.ship(10)
    assert names(store) == ["a2/step-10", "a2/step-9"]
    with pytest.raises(TraceMissing):
        Traces.of(settings).read(*places[2])
    assert Traces.of(settings).read(*places[9])["n"] == 9
    shipping._limit = 1
    await shipping.ship(10)
    assert names(store) == ["a2/step-10"]


@ELSEWHERE
async def test_the_limit_counts_what_other_hosts_stored(
    settings: Settings, store: ObjectStore, write: Callable[..., Any]
) -> None:
    first = write(1, attempt=1)
    await made(settings, store).finish(over=True)
    write(2)
    await made(settings, store, limit=first[2] + 1).ship(2)
    assert names(store) == ["a2/step-2"]


async def test_a_store_that_is_away_ends_nothing_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    steps: list[int | None] = []
    shipped = asyncio.Event()

    class Away(Shipping):
        def _ship(self, step: int | None, limit: int) -> None:
            steps.append(step)
            if len(steps) < 3:
                raise StorageUnavailable("s3://b", "no answer")
            shipped.set()

    shipping = Away(open_store(Settings(data_dir=tmp_path), "traces"), tmp_path, JOB, 1, 0)
    running = asyncio.create_task(shipping.run(lambda: 4))
    await asyncio.wait_for(shipped.wait(), 5)
    await asyncio.sleep(0.05)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert steps == [4, 4, 4]
