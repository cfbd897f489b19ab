"""Trace files: one zstd frame per rollout, appended; a row keeps (file, offset, length) (design §6.8).

Does not cover: what a trace holds (`workers.rollouts.recorder`). Ids, mask and log-probs travel packed (base64 of
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

_DTYPES = {"ids": np.int32, "mask": np.uint8, "log_probs": np.float32}


class TraceMissing(Exception):
    """The trace's file is gone (retention) or damaged."""


def pack(values: Sequence[int] | Sequence[float], field: str) -> str:
    """One of the fields of `_DTYPES` as base64."""
    return base64.b64encode(np.asarray(values, dtype=_DTYPES[field]).tobytes()).decode()


def unpack(text: str, field: str) -> list[Any]:
    return list(np.frombuffer(base64.b64decode(text), dtype=_DTYPES[field]).tolist())


def append_trace(path: Path, trace: dict[str, Any]) -> tuple[int, int]:
    """Append one frame; returns (offset, length). Blocking; one writer per file."""
    frame = zstandard.compress(json.dumps(trace, separators=(",", ":"), ensure_ascii=False).encode() + b"\n", 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        offset = file.tell()
        file.write(frame)
    return offset, len(frame)


def read_trace(traces_dir: Path, file: str, offset: int, length: int) -> dict[str, Any]:
    """The trace with its token arrays unpacked. Blocking. Raises `TraceMissing`."""
    path = (traces_dir / file).resolve()
    if not path.is_relative_to(traces_dir.resolve()):
        raise TraceMissing(file)
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            frame = stream.read(length)
        trace: dict[str, Any] = json.loads(zstandard.decompress(frame))
    except (OSError, zstandard.ZstdError, ValueError) as error:
        raise TraceMissing(f"{file} at {offset}: {error}") from error
    tokens = trace.get("tokens")
    if isinstance(tokens, dict):
        trace["tokens"] = {name: unpack(text, name) for name, text in tokens.items()}
    return trace
