"""The interface of storage: whole objects under keys, put once, read whole or by range.

Does not cover: adapters in flight and snapshots, which lie on the shared disk, and who owns an object.
Every call blocks for a bounded time: async callers run it in a thread.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from app.storage.errors import ObjectDamaged

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


@dataclass(frozen=True)
class Entry:
    """An object that is there."""

    key: str
    bytes: int


class ObjectStore(Protocol):
    """A key is names joined by `/`, made by the service (`check_key`). All raise StorageUnavailable."""

    @property
    def url(self) -> str:
        """Where it is, for people: without credentials."""
        ...

    def put(self, source: Path, key: str) -> None:
        """Store a copy of `source`, replacing what was there: complete and durable, or not at all."""
        ...

    def open(self, key: str) -> BinaryIO:
        """The whole object, at its beginning, for the caller to close. Raises ObjectMissing."""
        ...

    def read(self, key: str, offset: int, length: int) -> bytes:
        """A range; shorter where the object ends before it. Raises ObjectMissing."""
        ...

    def size(self, key: str) -> int | None:
        """In bytes; None: there is no such object."""
        ...

    def delete(self, key: str) -> None:
        """Idempotent."""
        ...

    def entries(self, folder: str = "") -> Sequence[Entry]:
        """Everything under `folder/`, at any depth; all objects without it."""
        ...

    def local(self, key: str) -> Path | None:
        """The very file that is (or would be) the object, where this store is a folder."""
        ...


def check_key(key: str) -> str:
    """`key` itself; ValueError for what could lead elsewhere. Names come from the server, so this is a second line."""
    if _KEY.fullmatch(key) is None:
        raise ValueError(f"not a storage key: {key!r}")
    return key


def open_verified(store: ObjectStore, key: str, sha256: str) -> BinaryIO:
    """As `open`, once all bytes are those that were recorded. Raises ObjectDamaged."""
    file = store.open(key)
    try:
        found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # takes any binary file
        if found != sha256:
            raise ObjectDamaged(store.url, key, sha256, found)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file
