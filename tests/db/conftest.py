"""A migrated SQLite database of its own for each test, and the rows most tests start from.

Does not cover: PostgreSQL.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.core.settings import Settings
from app.db import migrate
from app.db.engine import Database
from tests.db.rows import Seed


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data")


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    settings.root.mkdir(parents=True)
    migrate.upgrade(settings.database)
    made = Database(settings.database)
    yield made
    await made.close()


@pytest.fixture
def seed(database: Database, settings: Settings) -> Seed:
    return Seed(database, settings)
