"""Directories that appear whole or not at all: written under a temporary name, fsynced, renamed, parent fsynced.

Does not cover: what is in them (`workers.trainer.publish`, `workers.trainer.snapshot`).
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path


class AlreadyPublished(Exception):
    """The final name exists: a number is never published twice."""


def write_directory(final: Path, files: Mapping[str, bytes]) -> None:
    """Create `final` with exactly `files` (mode 0644 in a 0755 directory). Raises `AlreadyPublished`."""
    if final.exists():
        raise AlreadyPublished(f"{final} exists; a name is never written twice")
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        for name, content in files.items():
            with (temporary / name).open("xb") as file:
                os.fchmod(file.fileno(), 0o644)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        temporary.chmod(0o755)
        _fsync_directory(temporary)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync_directory(final.parent)


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
