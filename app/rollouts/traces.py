"""Trace files: one zstd frame per rollout, appended; a row keeps (file, offset, length) (design §6.8).

Does not cover: what a trace holds (`workers.rollouts.recorder`), bringing files to storage and their removal
(`workers.rollouts.shipping`). Ids, mask and log-probs travel packed (base64 of
little-endian arrays) and are unpacked on read, because an agent rollout of 10k tokens is 100–250 KB as JSON.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from app.core.settings import Settings
from app.storage.base import ObjectStore
from app.storage.build import open_store
from app.storage.errors import ObjectMissing
from app.storage.local import LocalStore

_DTYPES = {"ids": np.int32, "mask": np.uint8, "log_probs": np.float32}


class TraceMissing(Exception):
    """The trace's file is not there: removed, or not in storage yet."""


class TraceDamaged(Exception):
    """The bytes are not those that were written."""


def pack(values: Sequence[int] | Sequence[float], field: str) -> str:
    """One of the fields of `_DTYPES` as base64."""
    return base64.b64encode(np.asarray(values, dtype=_DTYPES[field]).tobytes()).decode()


def unpack(text: str, field: str) -> list[Any]:
    return list(np.frombuffer(base64.b64decode(text), dtype=_DTYPES[field]).tolist())


def append_trace(path: Path, trace: dict[str, Any]) -> tuple[int, int]:
    """Append one frame; returns (offset, length). Blocking; one writer per file."""
    text = json.dumps(trace, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
    frame = zstandard.ZstdCompressor(level=3, write_checksum=True).compress(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        offset = file.tell()
        file.write(frame)
    return offset, len(frame)


class Traces:
    """Reads from the file that a worker on this disk writes, else from storage. One per process."""

    def __init__(self, here: Path, store: ObjectStore | None = None) -> None:
        self._here = LocalStore(here)
        self._store = store

    @classmethod
    def of(cls, settings: Settings) -> Traces:
        return cls(settings.traces_dir, open_store(settings, "traces"))

    def read(self, file: str, offset: int, length: int) -> dict[str, Any]:
        """The trace with its token arrays unpacked. Blocking.

        Raises `TraceMissing`, `TraceDamaged` (each frame has a checksum), `StorageUnavailable`.
        """
        frame = self._frame(file, offset, length)
        try:
            if len(frame) < length:
                raise ValueError(f"{len(frame)} of {length} bytes are there")
            trace: dict[str, Any] = json.loads(zstandard.decompress(frame))
        except (zstandard.ZstdError, ValueError) as error:
            raise TraceDamaged(f"{file} at {offset}: {error}") from error
        tokens = trace.get("tokens")
        if isinstance(tokens, dict):
            trace["tokens"] = {name: unpack(text, name) for name, text in tokens.items()}
        return trace

    def _frame(self, file: str, offset: int, length: int) -> bytes:
        try:
            return self._here.read(file, offset, length)
        except ObjectMissing:
            if self._store is None:
                raise TraceMissing(file) from None
        except ValueError as error:  # no key: a name that leads elsewhere
            raise TraceMissing(str(error)) from error
        try:
            return self._store.read(file, offset, length)
        except ObjectMissing as error:
            raise TraceMissing(str(error)) from error
