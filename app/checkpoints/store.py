"""Checkpoint directories: copied from a published adapter, manifest with sha256, atomic rename; uploaded; verified.

Does not cover: who may see a checkpoint (`app.checkpoints.service`), the rows (`workers.registry`), reading one on
another host (`library`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from app.storage.base import ObjectStore
from app.storage.local import sync

MANIFEST = "manifest.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


class CorruptCheckpoint(Exception):
    """A file is missing or does not match the manifest."""


def key_of(job_id: str, attempt: int, step: int) -> str:
    """Where a checkpoint lies, in storage and below the local directory of checkpoints."""
    return f"{job_id}/a{attempt}/step-{step}"


def publish(source: Path, target: Path, facts: dict[str, Any]) -> str:
    """Copy the adapter in `source` to `target` atomically; returns the sha256 of the manifest.

    A target that exists already is the same checkpoint (its path carries job, attempt and step): it is verified.
    """
    if target.exists():
        return verify(target)
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    files: dict[str, dict[str, Any]] = {}
    for name in ADAPTER_FILES:
        shutil.copyfile(source / name, temporary / name)
        (temporary / name).chmod(0o644)  # a sampler under another uid must be able to read it
        sync(temporary / name)
        files[name] = {"sha256": digest(temporary / name), "bytes": (temporary / name).stat().st_size}
    (temporary / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=2, sort_keys=True))
    sync(temporary / MANIFEST)
    sync(temporary)
    temporary.chmod(0o755)
    temporary.rename(target)
    sync(target.parent)
    return digest(target / MANIFEST)


def upload(store: ObjectStore, directory: Path, key: str) -> None:
    """The adapter first, the manifest last: what has a manifest is whole. Raises `StorageUnavailable`."""
    for name in (*ADAPTER_FILES, MANIFEST):
        store.put(directory / name, f"{key}/{name}")


def verify(directory: Path) -> str:
    """Check every file against the manifest; returns the manifest's sha256. Raises `CorruptCheckpoint`."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        for name, facts in manifest["files"].items():
            if digest(directory / name) != facts["sha256"]:
                raise CorruptCheckpoint(f"{directory / name} does not match its manifest")
    except (OSError, ValueError, KeyError) as error:
        raise CorruptCheckpoint(f"{directory}: {error}") from error
    return digest(directory / MANIFEST)


def digest(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
