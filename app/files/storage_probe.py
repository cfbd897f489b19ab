"""Does storage work? An object is written, read back and deleted: what `hone doctor` asks.

Does not cover: how fast it is. Blocking, for at most a few deadlines of `app.storage.remote`.
"""

from __future__ import annotations

import secrets
import tempfile
from pathlib import Path

from app.core.settings import Settings
from app.storage.base import ObjectStore
from app.storage.build import open_store
from app.storage.errors import ObjectMissing, StorageUnavailable

__all__ = ["StorageUnavailable", "probe"]


def probe(settings: Settings) -> str:
    """A sentence that says where it is. Raises StorageUnavailable with the reason."""
    store = open_store(settings, "files")
    key, content = f"probe-{secrets.token_hex(8)}", secrets.token_bytes(32)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe")
        source.write_bytes(content)
        store.put(source, key)
    try:
        found = _content(store, key)
    finally:
        store.delete(key)
    if found != content:
        raise StorageUnavailable(store.url, "what was read back is not what was written")
    return f"{store.url} writable"


def _content(store: ObjectStore, key: str) -> bytes | None:
    try:
        with store.open(key) as file:
            return file.read()
    except ObjectMissing:
        return None
