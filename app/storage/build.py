"""From HONE_STORAGE_URL to the store of one area.

Does not cover: whether it answers (`app.files.storage_probe`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from app.core.settings import Settings
from app.storage.base import ObjectStore
from app.storage.local import LocalStore
from app.storage.remote import RemoteStore

Area = Literal["files", "checkpoints", "traces"]
LOCAL = ("file", "local")


def open_store(settings: Settings, area: Area) -> ObjectStore:
    """A folder of the data directory by default. Opens nothing yet: what is wrong is said by the first call."""
    url = (settings.storage_url or str(settings.root)).rstrip("/")
    scheme, _, _ = url.partition("://")
    if scheme == url:
        return LocalStore(Path(url) / area)
    if scheme in LOCAL:
        return LocalStore(Path(unquote(urlsplit(url).path)) / area)
    options = settings.storage_options.get_secret_value() if settings.storage_options else None
    return RemoteStore(f"{url}/{area}", options, settings.incoming_dir)
