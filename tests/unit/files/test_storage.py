"""Files appear complete or not at all, and only under ids of ours; a changed one is not read."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from app.files.storage import Shelf, Storage, TooLarge
from app.storage.errors import ObjectDamaged, ObjectMissing, StorageUnavailable

DIGEST = hashlib.sha256(b"hello").hexdigest()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "files")


def files(storage: Storage) -> list[Path]:
    return [path for path in Path(storage.store.url).rglob("*") if path.is_file()]


def test_a_published_file_has_its_bytes_and_digest(storage: Storage) -> None:
    stored = storage.put("file-a1", b"hello")
    assert (stored.sha256, stored.bytes) == (DIGEST, 5)
    with storage.open("file-a1", DIGEST) as file:
        assert file.read() == b"hello"
    assert [path.name for path in files(storage)] == ["file-a1"]


def test_a_changed_byte_is_refused(storage: Storage, tmp_path: Path) -> None:
    storage.put("file-a1", b"hello")
    (tmp_path / "files" / "file-a1").write_bytes(b"hallo")
    with pytest.raises(ObjectDamaged, match=DIGEST):
        storage.open("file-a1", DIGEST)


def test_a_shelf_has_the_files_that_were_looked_up(storage: Storage) -> None:
    storage.put("file-a1", b"hello")
    shelf = Shelf(storage, {"file-a1": DIGEST, "file-gone": DIGEST})
    with shelf.open("file-a1") as file:
        assert file.read() == b"hello"
    for missing in ("file-gone", "file-unknown"):
        with pytest.raises(ObjectMissing, match=missing):
            shelf.open(missing)


def test_a_byte_above_the_limit_is_refused_and_nothing_stays(storage: Storage) -> None:
    with storage.receive(4) as draft:
        draft.write(b"1234")
        with pytest.raises(TooLarge):
            draft.write(b"5")
    assert files(storage) == []


def test_an_unpublished_draft_is_removed(storage: Storage) -> None:
    with storage.receive(10) as draft:
        draft.write(b"half")
    assert not draft.path.exists()


@pytest.mark.parametrize("name", ["../hone.db", "file-../x", "file-a/b", "", "file-", "/etc/passwd", "file-a\n"])
def test_what_is_not_an_id_reaches_no_path(storage: Storage, name: str) -> None:
    for act in (lambda: storage.open(name, DIGEST), lambda: storage.delete(name), lambda: storage.put(name, b"")):
        with pytest.raises(ValueError, match="not a file id"):
            act()


def test_a_symbolic_link_is_not_followed(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "secret").write_text("hello")
    (tmp_path / "files" / "file-link").symlink_to(tmp_path / "secret")
    with pytest.raises(StorageUnavailable, match=r"[Ss]ymbolic"):
        storage.open("file-link", DIGEST)


def test_the_sweep_removes_old_drafts_only(storage: Storage) -> None:
    old, young = storage.receive(1), storage.receive(1)
    for draft in (old, young):
        draft.finish()
    os.utime(old.path, (time.time() - 90_000,) * 2)
    storage.sweep()
    assert (old.path.exists(), young.path.exists()) == (False, True)
