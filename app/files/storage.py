"""The bytes of files: streamed in with a limit and a digest, published by rename, opened by id.

Does not cover: names, purposes and owners of files (`app.files.service`); a client's file name never meets the disk.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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
    """A flat directory, one file an id; ids are made by the server and checked again here."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, file_id: str) -> Path:
        """Where the bytes of `file_id` are (or would be); raises ValueError for anything that is not an id of ours."""
        if _ID.fullmatch(file_id) is None:
            raise ValueError(f"not a file id: {file_id!r}")
        return self.root / file_id

    def open(self, file_id: str) -> BinaryIO:
        """For reading; raises FileNotFoundError. Never follows a symbolic link."""
        return os.fdopen(os.open(self.path(file_id), os.O_RDONLY | os.O_NOFOLLOW), "rb")

    def receive(self, limit: int) -> Incoming:
        """Begin to receive a file of at most `limit` bytes; the draft lies on the same file system as the result."""
        incoming = self.root / "incoming"
        incoming.mkdir(parents=True, exist_ok=True)
        return Incoming(incoming / secrets.token_hex(16), limit)

    def publish(self, incoming: Incoming, file_id: str) -> None:
        """Give a finished draft its name, durably."""
        os.rename(incoming.path, self.path(file_id))
        directory = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def put(self, file_id: str, content: bytes) -> Stored:
        """Store a file that the service itself produced, such as a job's results."""
        with self.receive(len(content)) as incoming:
            incoming.write(content)
            stored = incoming.finish()
            self.publish(incoming, file_id)
        return stored

    def sweep(self, older_than_s: float = 86400.0) -> None:
        """Remove drafts whose process died while it received them."""
        for draft in (self.root / "incoming").glob("*"):
            if time.time() - draft.stat().st_mtime > older_than_s:
                draft.unlink(missing_ok=True)

    def delete(self, file_id: str) -> None:
        """Idempotent."""
        self.path(file_id).unlink(missing_ok=True)
