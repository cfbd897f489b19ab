"""What every kind of storage does in the same way: a folder, an fsspec file system, an S3 server."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from app.core.settings import Settings
from app.files.storage_probe import probe
from app.storage.base import Entry, ObjectStore, open_verified
from app.storage.build import open_store
from app.storage.errors import ObjectDamaged, ObjectMissing, StorageUnavailable


def put(store: ObjectStore, key: str, content: bytes, folder: Path) -> None:
    source = folder / "source"
    source.write_bytes(content)
    store.put(source, key)
    assert source.read_bytes() == content
    source.unlink()


@pytest.mark.parametrize("content", [b"", b"hello", bytes(range(256)) * 5000])
def test_what_is_put_is_read_back(store: ObjectStore, tmp_path: Path, content: bytes) -> None:
    put(store, "a/b-1.bin", content, tmp_path)
    with store.open("a/b-1.bin") as file:
        assert file.read() == content
    assert store.size("a/b-1.bin") == len(content)


def test_a_later_put_replaces(store: ObjectStore, tmp_path: Path) -> None:
    put(store, "x", b"first and longer", tmp_path)
    put(store, "x", b"second", tmp_path)
    with store.open("x") as file:
        assert file.read() == b"second"
    assert store.entries() == [Entry("x", 6)]


def test_a_range_is_read_alone_and_is_short_at_the_end(store: ObjectStore, tmp_path: Path) -> None:
    put(store, "x", b"0123456789", tmp_path)
    assert [store.read("x", at, 4) for at in (0, 3, 8, 10, 99)] == [b"0123", b"3456", b"89", b"", b""]


def test_what_is_not_there_is_missing(store: ObjectStore, tmp_path: Path) -> None:
    put(store, "folder/x", b"1", tmp_path)
    for key in ("nothing", "folder/y"):
        assert store.size(key) is None
        with pytest.raises(ObjectMissing, match=key):
            store.open(key)
        with pytest.raises(ObjectMissing):
            store.read(key, 0, 1)
        store.delete(key)
    assert store.entries("elsewhere") == []


def test_a_source_that_is_gone_is_a_failure_like_others(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(StorageUnavailable, match="No such file"):
        store.put(tmp_path / "gone", "x")


def test_a_deleted_object_is_gone(store: ObjectStore, tmp_path: Path) -> None:
    put(store, "x", b"1", tmp_path)
    store.delete("x")
    assert (store.size("x"), store.entries()) == (None, [])


def test_entries_are_those_of_the_folder_at_any_depth(store: ObjectStore, tmp_path: Path) -> None:
    for key in ("j1/a1/x", "j1/a2/y", "j10/z", "j1.txt"):
        put(store, key, b"12", tmp_path)
    assert [entry.key for entry in store.entries()] == ["j1.txt", "j1/a1/x", "j1/a2/y", "j10/z"]
    assert list(store.entries("j1")) == [Entry("j1/a1/x", 2), Entry("j1/a2/y", 2)]


def test_areas_share_nothing(settings: Settings, store: ObjectStore, tmp_path: Path) -> None:
    put(store, "x", b"1", tmp_path)
    assert open_store(settings, "traces").entries() == []


def test_a_changed_byte_is_found_before_a_reader_sees_it(store: ObjectStore, tmp_path: Path) -> None:
    right = hashlib.sha256(b"weights").hexdigest()
    put(store, "x", b"weights", tmp_path)
    with open_verified(store, "x", right) as file:
        assert file.read() == b"weights"
    put(store, "x", b"Weights", tmp_path)
    with pytest.raises(ObjectDamaged, match=right):
        open_verified(store, "x", right)


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a//b", "a/../b", ".hidden", "a/", "a\n", "ä", "a b"])
def test_a_name_that_could_lead_elsewhere_is_refused(store: ObjectStore, tmp_path: Path, key: str) -> None:
    with pytest.raises((ValueError, StorageUnavailable), match="not a storage key"):
        store.open(key)


def test_the_probe_leaves_nothing(settings: Settings, store: ObjectStore) -> None:
    assert probe(settings) == f"{store.url} writable"
    assert store.entries() == []
