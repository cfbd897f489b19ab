"""A checkpoint on a host that did not train it: uploaded whole, fetched once, and never used when a byte is wrong."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from app.checkpoints import store
from app.checkpoints.library import Library, Reference
from app.checkpoints.store import ADAPTER_FILES, MANIFEST, CorruptCheckpoint
from app.core.settings import Settings
from app.storage.base import ObjectStore
from app.storage.build import open_store
from app.storage.errors import StorageUnavailable
from workers import storing
from workers.storing import Checkpoints, persist

WEIGHTS, KEY = ADAPTER_FILES[0], "ftjob-1/a1/step-3"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    made = tmp_path / "adapter"
    made.mkdir()
    for name in ADAPTER_FILES:
        (made / name).write_bytes(name.encode() * 1000)
    return made


@pytest.fixture
def kept(settings: Settings) -> ObjectStore:
    return open_store(settings, "checkpoints")


@pytest.fixture
async def reference(settings: Settings, kept: ObjectStore, adapter: Path) -> Reference:
    """As a worker publishes it."""
    checkpoints = Checkpoints(kept, settings.checkpoints_dir, "ftjob-1", 1)
    path, sha256 = await checkpoints.publish(adapter, 3, {"step": 3})
    return Reference(str(path), KEY, sha256)


@pytest.fixture
def library(settings: Settings, reference: Reference) -> Library:
    """Of a host that has none of the worker's disk, where storage is elsewhere."""
    if settings.storage_url:
        shutil.rmtree(settings.checkpoints_dir)
    return Library.of(settings)


async def test_it_is_there_though_the_workers_directory_is_gone(library: Library, reference: Reference) -> None:
    found = library.locate(reference)
    assert store.verify(found) == reference.sha256
    assert {path.name for path in found.iterdir()} == {*ADAPTER_FILES, MANIFEST}
    assert library.locate(reference) == found


async def test_a_copy_is_fetched_once(library: Library, reference: Reference, kept: ObjectStore) -> None:
    found = library.locate(reference)
    if kept.local(KEY) is None:
        kept.delete(f"{KEY}/{MANIFEST}")
    assert library.locate(reference) == found


async def test_a_copy_that_is_asked_for_again_is_young_again(library: Library, reference: Reference) -> None:
    if (found := library.locate(reference)).is_relative_to(library._cache):
        os.utime(found, (1.0, 1.0))
        library.locate(reference)
        assert found.stat().st_mtime > 1.0


@pytest.mark.parametrize("settings", ["folder", "s3"], indirect=True)  # readers share a position in memory://
async def test_many_who_ask_at_once_get_one_whole_copy(
    settings: Settings, library: Library, reference: Reference
) -> None:
    libraries = [Library.of(settings) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        found = set(pool.map(lambda one: one.locate(reference), libraries))
    (place,) = found
    assert store.verify(place) == reference.sha256
    assert [path.name for path in place.parent.iterdir()] == [place.name]


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST])
async def test_a_changed_byte_in_storage_is_refused(
    library: Library, reference: Reference, kept: ObjectStore, tmp_path: Path, name: str
) -> None:
    with kept.open(f"{KEY}/{name}") as file:
        content = bytearray(file.read())
    content[20] ^= 1
    (tmp_path / "changed").write_bytes(content)
    kept.put(tmp_path / "changed", f"{KEY}/{name}")
    for _ in range(2):
        with pytest.raises(CorruptCheckpoint):
            library.locate(reference)


@pytest.mark.parametrize("settings", ["memory", "s3"], indirect=True)
async def test_a_changed_copy_is_replaced_from_storage(library: Library, reference: Reference) -> None:
    copy = library.locate(reference)
    right = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(b"x" + right[1:])
    assert library.locate(reference) == copy
    assert (copy / WEIGHTS).read_bytes() == right
    assert {path.name for path in copy.iterdir()} == {*ADAPTER_FILES, MANIFEST}
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


async def test_files_that_are_nowhere_are_named(library: Library, reference: Reference, kept: ObjectStore) -> None:
    for entry in kept.entries():
        kept.delete(entry.key)
    with pytest.raises(CorruptCheckpoint, match="gone"):
        library.locate(reference)


class AwayFor:
    """A store that does not answer so many times."""

    def __init__(self, times: int) -> None:
        self.times, self.calls = times, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise StorageUnavailable("s3://b", "no answer")
        return "done"


async def test_a_store_that_comes_back_costs_nothing_but_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "PAUSES_S", (0.001, 0.002))
    work = AwayFor(5)
    assert await persist(work) == "done"
    assert work.calls == 6


async def test_a_store_that_stays_away_is_said_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "PAUSES_S", (0.01,))
    monkeypatch.setattr(storing, "PATIENCE_S", 0.05)
    with pytest.raises(StorageUnavailable):
        await persist(AwayFor(10**6))


async def test_the_manifest_is_uploaded_last(settings: Settings, adapter: Path) -> None:
    order: list[str] = []

    class Watched:
        def put(self, source: Path, key: str) -> None:
            order.append(key)

    kept: Any = Watched()
    await Checkpoints(kept, settings.checkpoints_dir, "ftjob-1", 1).publish(adapter, 3, {})
    assert order == [f"{KEY}/{name}" for name in (*ADAPTER_FILES, MANIFEST)]
