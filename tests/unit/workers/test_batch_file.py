"""The batch file: what the supervisor wrote is what the trainer reads, or it is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from workers.batch import BatchError, TrainingRow, read_batch, write_batch

float32 = st.floats(-100, 100, width=32)
tokens = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 1), float32), max_size=12)
row = st.builds(
    lambda tokens, advantage, group: TrainingRow(
        [t[0] for t in tokens], [t[1] for t in tokens], [t[2] for t in tokens], advantage, group
    ),
    tokens,
    float32,
    st.integers(0, 1000),
)
ROWS = [TrainingRow([1, 2, 3], [0, 1, 1], [0.0, -0.5, -0.25], 0.5, 7), TrainingRow([4], [1], [-1.0], -0.5, 8)]


@given(rows=st.lists(row, max_size=6))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_batch_is_read_as_it_was_written(rows: list[TrainingRow], tmp_path: Path) -> None:
    path = tmp_path / "batches" / "1.safetensors"
    assert read_batch(path, write_batch(path, rows)) == rows


def test_the_digest_is_the_files_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "1.safetensors"
    sha256 = write_batch(path, ROWS)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    assert [found.name for found in tmp_path.iterdir()] == ["1.safetensors"]


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    write_batch(tmp_path / "1", ROWS)
    tensors = load((tmp_path / "1").read_bytes())
    assert {name: (str(t.dtype), t.shape) for name, t in tensors.items()} == {
        "ids": ("int32", (4,)),
        "mask": ("uint8", (4,)),
        "log_probs": ("float32", (4,)),
        "advantages": ("float32", (2,)),
        "offsets": ("int64", (3,)),
        "groups": ("int32", (2,)),
    }
    assert tensors["offsets"].tolist() == [0, 3, 4]


def test_a_changed_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "1"
    sha256 = write_batch(path, ROWS)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BatchError, match="does not match its sha256"):
        read_batch(path, sha256)


@pytest.mark.parametrize("change", ["missing", "short", "few"])
def test_a_file_whose_parts_disagree_is_refused(tmp_path: Path, change: str) -> None:
    write_batch(tmp_path / "1", ROWS)
    tensors = dict(load((tmp_path / "1").read_bytes()))
    if change == "missing":
        del tensors["mask"]
    elif change == "short":
        tensors["mask"] = tensors["mask"][:-1].copy()
    else:
        tensors["advantages"] = np.zeros(1, dtype=np.float32)
    data = save(tensors)
    (tmp_path / "1").write_bytes(data)
    with pytest.raises(BatchError, match=r"missing|disagree"):
        read_batch(tmp_path / "1", hashlib.sha256(data).hexdigest())
