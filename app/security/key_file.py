"""The key file while its keys change, in whole steps.

Does not cover: reading it (`app.security.vault`), what is sealed with the keys (`app.security.rotation`), settings.

The file holds one key a line, the newest first. A rotation puts a new one on top, and takes the others out when no
value needs them any more; whenever it dies, the file is the one before or the one after, and both open everything.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.security.vault import KEY_FILE, VaultError
from app.storage.local import sync


@contextmanager
def only_rotation(data_dir: Path) -> Iterator[None]:
    """Two rotations at once would drop each other's key; the lock goes with the process. Raises VaultError."""
    with (data_dir / f"{KEY_FILE}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VaultError("another rotation is running") from None
        yield


def add_key(path: Path) -> bool:
    """Put a new key on top. False when a rotation that did not end left one there: that one is to be finished."""
    keys = path.read_text(encoding="ascii").split()
    if len(keys) > 1:
        return False
    _replace(path, [secrets.token_urlsafe(32), *keys])
    return True


def drop_old_keys(path: Path) -> None:
    """Leave the newest key alone in the file."""
    _replace(path, path.read_text(encoding="ascii").split()[:1])


def _replace(path: Path, keys: list[str]) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write("".join(f"{key}\n" for key in keys))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)  # else a power cut may bring the old file back after values were sealed with the new key
