"""The batch file: the rollouts of one optimizer step, flat, as safetensors with NumPy on both sides.

Does not cover: which rollouts go in (`workers.rollouts.batch`), nor how they are packed (`workers.trainer.packing`).

Layout, for R rollouts and T tokens in all:
  ids         int32  [T]    prompt and completion tokens exactly as the sampler saw and returned them
  mask        uint8  [T]    1 = sampled by the policy (trained), 0 = prompt, tool result, template
  log_probs   float32[T]    the sampler's log-prob of each sampled token at temperature 1; 0 where mask is 0
  advantages  float32[R]    one per rollout
  offsets     int64  [R+1]  rollout r is [offsets[r], offsets[r+1])
  groups      int32  [R]    dataset-row group of each rollout (siblings share it; they share their prompt)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save


@dataclass(frozen=True)
class TrainingRow:
    """One rollout as the trainer sees it; the three token arrays have the same length."""

    ids: Sequence[int]
    mask: Sequence[int]
    log_probs: Sequence[float]
    advantage: float
    group: int


class BatchError(Exception):
    """The file does not match its digest or its layout."""


def write_batch(path: Path, rows: Sequence[TrainingRow]) -> str:
    """Write atomically (temp, fsync, rename); returns the sha256 of the file."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row.ids) for row in rows], out=offsets[1:])
    data = save(
        {
            "ids": _flat([row.ids for row in rows], np.int32),
            "mask": _flat([row.mask for row in rows], np.uint8),
            "log_probs": _flat([row.log_probs for row in rows], np.float32),
            "advantages": np.asarray([row.advantage for row in rows], dtype=np.float32),
            "offsets": offsets,
            "groups": np.asarray([row.group for row in rows], dtype=np.int32),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    return hashlib.sha256(data).hexdigest()


def read_batch(path: Path, sha256: str) -> list[TrainingRow]:
    """Read back; raises `BatchError` if digest or layout do not hold."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BatchError(f"{path}: content does not match its sha256 {sha256}")
    tensors = load(data)
    try:
        ids, mask, log_probs = tensors["ids"], tensors["mask"], tensors["log_probs"]
        offsets, advantages, groups = tensors["offsets"], tensors["advantages"], tensors["groups"]
    except KeyError as error:
        raise BatchError(f"{path}: tensor {error} is missing") from error
    if not len(ids) == len(mask) == len(log_probs) == offsets[-1] or len(advantages) != len(offsets) - 1:
        raise BatchError(f"{path}: lengths disagree")
    return [
        TrainingRow(
            ids=ids[start:end].tolist(),
            mask=mask[start:end].tolist(),
            log_probs=log_probs[start:end].tolist(),
            advantage=float(advantages[index]),
            group=int(groups[index]),
        )
        for index, (start, end) in enumerate(pairwise(offsets))
    ]


def _flat(parts: Sequence[Sequence[int] | Sequence[float]], dtype: type[np.generic]) -> NDArray[np.generic]:
    return np.concatenate([np.asarray(part, dtype=dtype) for part in parts]) if parts else np.zeros(0, dtype=dtype)
