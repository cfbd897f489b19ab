"""What is wrong with an adapter's files is found before a sampler reads them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.workers.adapter_files import RANK, WIDTH, Tensors, expected, write_adapter, write_base
from workers.sampler.proof.files import AdapterFiles, BrokenAdapter, base_shapes

FIRST = "base_model.model.model.layers.0.attn.q_proj.lora_A.weight"


@pytest.fixture
def files(tmp_path: Path) -> AdapterFiles:
    return expected(write_base(tmp_path / "base"))


def test_an_adapter_as_the_trainer_writes_it_is_fine(files: AdapterFiles, tmp_path: Path) -> None:
    for version in (0, 1):
        files.check(tmp_path / f"v{version}", write_adapter(tmp_path / f"v{version}", fill=version))


def lose_a_layer(config: dict[str, Any], tensors: Tensors) -> None:
    for key in [key for key in tensors if ".layers.1." in key]:
        del tensors[key]


def lose_a_half(config: dict[str, Any], tensors: Tensors) -> None:
    del tensors[FIRST]


def lose_a_target(config: dict[str, Any], tensors: Tensors) -> None:
    for key in [key for key in tensors if "q_proj" in key]:
        del tensors[key]


def shorten(config: dict[str, Any], tensors: Tensors) -> None:
    tensors[FIRST] = np.zeros((RANK, WIDTH - 1), np.float32)


def transpose(config: dict[str, Any], tensors: Tensors) -> None:
    tensors[FIRST] = tensors[FIRST].T.copy()


def not_a_number(config: dict[str, Any], tensors: Tensors) -> None:
    tensors[FIRST][0, 0] = np.nan


def infinite(config: dict[str, Any], tensors: Tensors) -> None:
    tensors[FIRST] = np.full((RANK, WIDTH), np.inf, np.float16)


def another_scale(config: dict[str, Any], tensors: Tensors) -> None:
    config["lora_alpha"] = 8


def another_rule(config: dict[str, Any], tensors: Tensors) -> None:
    config["use_rslora"] = True


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lose_a_layer, "2 layers are missing"),
        (lose_a_half, "missing or surplus"),
        (lose_a_target, "target q_proj"),
        (shorten, "shapes"),
        (transpose, "shapes"),
        (not_a_number, "not finite"),
        (infinite, "not finite"),
        (another_scale, "lora_alpha"),
        (another_rule, "use_rslora"),
    ],
)
def test_each_fault_is_named(files: AdapterFiles, tmp_path: Path, edit: Any, words: str) -> None:
    sha256 = write_adapter(tmp_path / "v1", edit)
    with pytest.raises(BrokenAdapter, match=words):
        files.check(tmp_path / "v1", sha256)


def test_other_content_than_the_trainer_wrote_is_refused(files: AdapterFiles, tmp_path: Path) -> None:
    write_adapter(tmp_path / "v1", fill=0.2)
    with pytest.raises(BrokenAdapter, match="sha256"):
        files.check(tmp_path / "v1", write_adapter(tmp_path / "v2", fill=0.3))


@pytest.mark.parametrize("cut", [slice(0, -4), slice(0, 40), slice(0, 0)])
def test_a_file_that_is_cut_is_refused(files: AdapterFiles, tmp_path: Path, cut: slice) -> None:
    write_adapter(tmp_path / "v1")
    path = tmp_path / "v1" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[cut])
    with pytest.raises(BrokenAdapter, match=r"cut|not a safetensors"):
        files.check(tmp_path / "v1", hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_file_that_others_cannot_read_is_refused(files: AdapterFiles, tmp_path: Path) -> None:
    sha256 = write_adapter(tmp_path / "v1")
    (tmp_path / "v1" / "adapter_model.safetensors").chmod(0o600)
    with pytest.raises(BrokenAdapter, match="readable"):
        files.check(tmp_path / "v1", sha256)


def test_a_file_that_is_not_there_is_refused(files: AdapterFiles, tmp_path: Path) -> None:
    with pytest.raises(BrokenAdapter, match="missing"):
        files.check(tmp_path / "v1", "x")


def test_a_later_version_must_look_like_the_first(tmp_path: Path) -> None:
    files = expected(tmp_path / "a base in another format")
    files.check(tmp_path / "v0", write_adapter(tmp_path / "v0"))
    with pytest.raises(BrokenAdapter, match="first version"):
        files.check(tmp_path / "v1", write_adapter(tmp_path / "v1", lose_a_layer))


def test_only_matrices_of_the_base_count(tmp_path: Path) -> None:
    assert base_shapes(write_base(tmp_path / "base"))["model.layers.1.attn.o_proj"] == (WIDTH, WIDTH)
    assert base_shapes(tmp_path / "nothing") == {}
