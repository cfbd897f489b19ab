"""Objects as files of a folder: atomic by rename, durable by fsync, never through a symbolic link.

Does not cover: object stores (`remote`).
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from app.storage.base import Entry, check_key
from app.storage.errors import ObjectMissing, StorageUnavailable

_NO_LINKS = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS})


class LocalStore:
    """Names that begin with a dot are drafts, no objects."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def url(self) -> str:
        return str(self._root)

    def put(self, source: Path, key: str) -> None:
        """A file that lies at its place already stays as it is."""
        target = self.local(key)
        with self._failing():
            if target.exists() and source.samefile(target):
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            draft = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
            try:
                _link_or_copy(source, draft)
                sync(draft)
                draft.rename(target)
            finally:
                draft.unlink(missing_ok=True)
            sync(target.parent)

    def open(self, key: str) -> BinaryIO:
        with self._failing(key):
            return os.fdopen(os.open(self.local(key), os.O_RDONLY | os.O_NOFOLLOW), "rb")

    def read(self, key: str, offset: int, length: int) -> bytes:
        with self.open(key) as file, self._failing(key):
            file.seek(offset)
            return file.read(length)

    def size(self, key: str) -> int | None:
        with self._failing():
            try:
                return self.local(key).stat().st_size
            except FileNotFoundError:
                return None

    def delete(self, key: str) -> None:
        with self._failing():
            self.local(key).unlink(missing_ok=True)

    def entries(self, folder: str = "") -> Sequence[Entry]:
        with self._failing():
            return list(self._entries(self.local(folder) if folder else self._root))

    def local(self, key: str) -> Path:
        return self._root / check_key(key)

    def _entries(self, folder: Path) -> Iterator[Entry]:
        for directory, names, files in os.walk(folder):
            names[:] = sorted(name for name in names if not name.startswith("."))
            for name in sorted(name for name in files if not name.startswith(".")):
                path = Path(directory, name)
                yield Entry(path.relative_to(self._root).as_posix(), path.stat().st_size)

    @contextmanager
    def _failing(self, key: str | None = None) -> Iterator[None]:
        """With `key`, a missing file is a missing object; without, it is a fault."""
        try:
            yield
        except FileNotFoundError as error:
            if key is not None:
                raise ObjectMissing(self.url, key) from error
            raise StorageUnavailable(self.url, f"{error.strerror} ({error.filename})") from error
        except OSError as error:
            raise StorageUnavailable(self.url, error.strerror or type(error).__name__) from error


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link_or_copy(source: Path, target: Path) -> None:
    """A second name costs no space; not every file system has them."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)
