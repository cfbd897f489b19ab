"""Files appear complete or not at all, and only under ids of ours."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from app.files.storage import Storage, TooLarge


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "files")


def test_a_published_file_has_its_bytes_and_digest(storage: Storage) -> None:
    stored = storage.put("file-a1", b"hello")
    assert stored.sha256 == hashlib.sha256(b"hello").hexdigest()
    with storage.open("file-a1") as file:
        assert file.read() == b"hello"


def test_a_byte_above_the_limit_is_refused_and_nothing_stays(storage: Storage) -> None:
    with storage.receive(4) as draft:
        draft.write(b"1234")
        with pytest.raises(TooLarge):
            draft.write(b"5")
    assert [path for path in storage.root.rglob("*") if path.is_file()] == []


def test_an_unpublished_draft_is_removed(storage: Storage) -> None:
    with storage.receive(10) as draft:
        draft.write(b"half")
    assert not draft.path.exists()


@pytest.mark.parametrize("name", ["../hone.db", "file-../x", "file-a/b", "", "file-", "/etc/passwd", "file-a\n"])
def test_what_is_not_an_id_reaches_no_path(storage: Storage, name: str) -> None:
    with pytest.raises(ValueError, match="not a file id"):
        storage.path(name)


def test_a_symbolic_link_is_not_followed(storage: Storage, tmp_path: Path) -> None:
    storage.root.mkdir()
    (tmp_path / "secret").write_text("no")
    storage.path("file-link").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match=r"[Ss]ymbolic"):
        storage.open("file-link")


def test_the_sweep_removes_old_drafts_only(storage: Storage) -> None:
    old, young = storage.receive(1), storage.receive(1)
    for draft in (old, young):
        draft.finish()
    os.utime(old.path, (time.time() - 90_000,) * 2)
    storage.sweep()
    assert (old.path.exists(), young.path.exists()) == (False, True)
