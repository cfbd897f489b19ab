"""An S3 server for the session; a store of each kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.settings import Settings
from app.storage.base import ObjectStore
from app.storage.build import open_store
from tests import s3 as real


@pytest.fixture(scope="session")
def s3() -> Iterator[real.S3]:
    with real.server() as made:
        yield made


@pytest.fixture(params=["folder", "memory", "s3"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """One installation for each kind of storage."""
    data = tmp_path / "data"
    if request.param == "folder":
        return Settings(data_dir=data)
    if request.param == "memory":
        return Settings(data_dir=data, storage_url=f"memory://{tmp_path.name}")
    server: real.S3 = request.getfixturevalue("s3")
    return server.settings(data)


@pytest.fixture
def store(settings: Settings) -> ObjectStore:
    return open_store(settings, "files")
