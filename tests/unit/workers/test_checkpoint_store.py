"""Checkpoint directories: atomic, verified, published once; and the names clients see."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.checkpoints import names, store
from app.checkpoints.store import ADAPTER_FILES, MANIFEST, CorruptCheckpoint

FACTS = {"job": "ftjob-1", "step": 3}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    directory.mkdir()
    for name in (*ADAPTER_FILES, "canary_log_probs.json"):
        (directory / name).write_bytes(name.encode() * 10)
    return directory


def test_a_published_checkpoint_has_the_adapter_the_facts_and_digests(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "job" / "a1" / "step-3"
    sha256 = store.publish(source, target, FACTS)
    assert {path.name for path in target.iterdir()} == {*ADAPTER_FILES, MANIFEST}
    manifest = json.loads((target / MANIFEST).read_text())
    assert FACTS.items() <= manifest.items()
    assert set(manifest["files"]) == set(ADAPTER_FILES)
    assert store.verify(target) == sha256 == store.digest(target / MANIFEST)
    assert all((target / name).stat().st_mode & 0o777 == 0o644 for name in ADAPTER_FILES)
    assert [path.name for path in target.parent.iterdir()] == ["step-3"]


def test_publishing_again_is_the_same_checkpoint(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "step-3"
    first = store.publish(source, target, FACTS)
    (source / ADAPTER_FILES[0]).write_bytes(b"later")
    assert store.publish(source, target, {"other": 1}) == first


def test_a_half_written_checkpoint_of_a_killed_worker_is_not_in_the_way(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "step-3"
    store.publish(source, target, FACTS)
    target.rename(target.with_name("step-3.tmp-1"))
    (target.with_name("step-3.tmp-1") / ADAPTER_FILES[0]).unlink()
    assert store.publish(source, target, FACTS) == store.verify(target)


def test_a_source_without_an_adapter_makes_no_checkpoint(source: Path, tmp_path: Path) -> None:
    (source / ADAPTER_FILES[1]).unlink()
    with pytest.raises(FileNotFoundError):
        store.publish(source, tmp_path / "step-3", FACTS)
    assert not (tmp_path / "step-3").exists()


@pytest.mark.parametrize("harm", ["flip", "missing", "manifest-gone", "manifest-cut", "manifest-empty"])
def test_harm_is_found(source: Path, tmp_path: Path, harm: str) -> None:
    target = tmp_path / "step-3"
    store.publish(source, target, FACTS)
    weights, manifest = target / ADAPTER_FILES[0], target / MANIFEST
    if harm == "flip":
        data = bytearray(weights.read_bytes())
        data[3] ^= 1
        weights.write_bytes(data)
    elif harm == "missing":
        weights.unlink()
    elif harm == "manifest-gone":
        manifest.unlink()
    elif harm == "manifest-cut":
        manifest.write_text(manifest.read_text()[:-10])
    else:
        manifest.write_text("{}")
    with pytest.raises(CorruptCheckpoint):
        store.verify(target)
    with pytest.raises(CorruptCheckpoint):
        store.publish(source, target, FACTS)


def test_names_are_the_hosted_apis() -> None:
    final = names.fine_tuned("qwen3-8b", "org-hone", "shop", "ftjob-AbCdEfGhIjK")
    assert final == "ft:qwen3-8b:hone:shop:AbCdEfGh"
    assert names.fine_tuned("qwen3-8b", "hone", None, "ftjob-AbCdEfGhIjK") == "ft:qwen3-8b:hone::AbCdEfGh"
    assert names.at_step(final, 12) == "ft:qwen3-8b:hone:shop:AbCdEfGh:ckpt-step-12"
