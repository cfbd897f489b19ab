"""A migrated database of its own for each test, on SQLite and on PostgreSQL, and the rows most tests start from.

Does not cover: rooms that borrow these fixtures (`tests/unit`): there they mean SQLite.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from app.core.settings import Settings
from app.db import migrate
from app.db.engine import Database
from tests import postgres as real
from tests.db.rows import Seed

BOTH = ("sqlite", "postgresql")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test of this folder that needs a database runs once on each; `DATABASES` in a module names fewer."""
    for fixture in {"settings", "url"} & set(metafunc.fixturenames):
        wanted = getattr(metafunc.module, "DATABASES", BOTH)
        metafunc.parametrize(fixture, wanted, indirect=True, scope="function")


@cache
def migrated_sqlite() -> bytes:
    """A file that the real migrations made, once."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "hone.db"
        migrate.upgrade(f"sqlite:///{path}")
        return path.read_bytes()


@pytest.fixture(scope="session")
def postgres() -> Iterator[real.Server]:
    try:
        with real.server() as server:
            yield server
    except real.NoPostgres as reason:
        pytest.skip(str(reason))


@pytest.fixture
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Settings]:
    """Settings of an installation of its own. On PostgreSQL its database is there already, with all tables."""
    if getattr(request, "param", "sqlite") == "sqlite":
        yield Settings(data_dir=tmp_path / "data")
        return
    server: real.Server = request.getfixturevalue("postgres")
    url = server.create_database()
    yield Settings(data_dir=tmp_path / "data", database_url=url)
    server.drop_database(url)


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    settings.root.mkdir(parents=True)
    if settings.database_url is None:
        (settings.root / "hone.db").write_bytes(migrated_sqlite())
    made = Database(settings.database)
    yield made
    await made.close()


@pytest.fixture
def seed(database: Database, settings: Settings) -> Seed:
    return Seed(database, settings)
