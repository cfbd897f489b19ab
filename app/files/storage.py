"""The bytes of files: streamed in with a limit and a digest, published as a whole, opened by id and digest.

Does not cover: where they lie (`app.storage`); names, purposes and owners of files (`app.files.service`): a client's
file name never meets the disk.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from app.core.settings import Settings
from app.storage.base import ObjectStore, open_verified
from app.storage.build import open_store
from app.storage.errors import ObjectMissing
from app.storage.local import LocalStore

_ID = re.compile(r"file-[A-Za-z0-9]{1,64}")


class TooLarge(Exception):
    """More bytes arrived than the limit allows; nothing is kept."""


@dataclass(frozen=True)
class Stored:
    """What is on disk now."""

    bytes: int
    sha256: str


class Incoming:
    """One file being received: `write` until done, then `publish`; leaving it unpublished removes it.

    Blocking: async callers run each call in a thread.
    """

    def __init__(self, draft: Path, limit: int) -> None:
        self.path = draft
        self._limit, self._size, self._digest = limit, 0, hashlib.sha256()
        self._file = draft.open("xb")

    def __enter__(self) -> Incoming:
        return self

    def __exit__(self, *exc: object) -> None:
        self.discard()

    def write(self, chunk: bytes) -> None:
        """Raises TooLarge before a byte above the limit is written."""
        self._size += len(chunk)
        if self._size > self._limit:
            raise TooLarge
        self._digest.update(chunk)
        self._file.write(chunk)

    def finish(self) -> Stored:
        """Everything written is on the disk itself, still under its temporary name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return Stored(self._size, self._digest.hexdigest())

    def discard(self) -> None:
        """Remove what was not published; harmless afterwards."""
        self._file.close()
        self.path.unlink(missing_ok=True)


class Storage:
    """One object an id; ids are made by the server and checked again here. Drafts lie in a local folder."""

    def __init__(self, root: Path, store: ObjectStore | None = None) -> None:
        self._drafts = root / ".incoming"
        self.store: ObjectStore = LocalStore(root) if store is None else store

    @classmethod
    def of(cls, settings: Settings) -> Storage:
        return cls(settings.files_dir, open_store(settings, "files"))

    def open(self, file_id: str, sha256: str) -> BinaryIO:
        """For reading, once every byte is as recorded. Raises ObjectMissing, ObjectDamaged, StorageUnavailable."""
        return open_verified(self.store, _key(file_id), sha256)

    def receive(self, limit: int) -> Incoming:
        """Begin to receive a file of at most `limit` bytes."""
        self._drafts.mkdir(parents=True, exist_ok=True)
        return Incoming(self._drafts / secrets.token_hex(16), limit)

    def publish(self, incoming: Incoming, file_id: str) -> None:
        """Give a finished draft its name, durably. Raises StorageUnavailable."""
        self.store.put(incoming.path, _key(file_id))

    def put(self, file_id: str, content: bytes) -> Stored:
        """Store a file that the service itself produced, such as a job's results."""
        with self.receive(len(content)) as incoming:
            incoming.write(content)
            stored = incoming.finish()
            self.publish(incoming, file_id)
        return stored

    def delete(self, file_id: str) -> None:
        """Idempotent. Raises StorageUnavailable."""
        self.store.delete(_key(file_id))

    def check(self) -> None:
        """Can a file be received, and does the store answer? Raises OSError, StorageUnavailable."""
        with self.receive(1) as draft:
            draft.write(b"\0")
            draft.finish()
        self.store.size("file-none")

    def sweep(self, older_than_s: float = 86400.0) -> None:
        """Remove drafts whose process died while it received them."""
        for draft in self._drafts.glob("*"):
            if time.time() - draft.stat().st_mtime > older_than_s:
                draft.unlink(missing_ok=True)


@dataclass(frozen=True)
class Shelf:
    """Files whose digests were looked up: what a thread reads from, which has no session."""

    storage: Storage
    digests: Mapping[str, str]

    def open(self, file_id: str) -> BinaryIO:
        """As `Storage.open`; a file that no row knows is missing."""
        if file_id not in self.digests:
            raise ObjectMissing(self.storage.store.url, file_id)
        return self.storage.open(file_id, self.digests[file_id])


def _key(file_id: str) -> str:
    """Raises ValueError for anything that is not an id of ours."""
    if _ID.fullmatch(file_id) is None:
        raise ValueError(f"not a file id: {file_id!r}")
    return file_id
