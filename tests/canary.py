"""Searches what an installation left behind for secrets that were planted in it.

Does not cover: planting them (`tests/api/test_secret_canary.py`, `tests/e2e/test_secrets.py`).
"""

from __future__ import annotations

import base64
import io
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import zstandard

from app.security.vault import KEY_FILE

KEYS = {KEY_FILE, "api_keys.secret"}


def found_in(text: str, secrets: Sequence[str]) -> list[str]:
    """The secrets in a text, plain or in base64 at any offset."""
    hits = [secret for secret in secrets if secret in text]
    for secret in secrets:
        for shift in range(3):
            core = base64.b64encode(b"\0" * shift + secret.encode()).decode()[4:-4]
            hits += [f"{secret} in base64"] if core in text else []
    return hits


def left_in(root: Path) -> dict[str, str]:
    """Every file of the installation but the keys themselves, packed ones unpacked, and the database as SQL."""
    files = [path for path in root.rglob("*") if path.is_file() and path.name not in KEYS]
    texts = {str(path.relative_to(root)): _content(path).decode("latin-1") for path in files}
    with sqlite3.connect(root / "hone.db") as connection:
        texts["dump"] = "\n".join(connection.iterdump())
    connection.close()
    return texts


def _content(path: Path) -> bytes:
    packed = path.read_bytes()
    if path.suffix != ".zst":
        return packed
    return zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed), read_across_frames=True).read()
