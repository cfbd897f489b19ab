"""The real migrations on SQLite: up, down, up; no drift from the tables; the pragmas that make it safe."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from app.core.settings import Settings
from app.db import migrate
from app.db.engine import Database, create_sync
from app.db.tables import Base
from app.jobs import events


def tables(path: Path) -> set[str]:
    with sqlite3.connect(path) as connection:
        found = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    connection.close()
    return {name for name in found if not name.startswith("sqlite_")}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path / '100% x.db'}"


def test_up_down_and_up_again(tmp_path: Path, url: str) -> None:
    wanted = set(Base.metadata.tables) | {"alembic_version"}
    migrate.upgrade(url)
    assert tables(tmp_path / "100% x.db") == wanted
    migrate.downgrade(url, "base")
    assert tables(tmp_path / "100% x.db") == {"alembic_version"}
    migrate.upgrade(url)
    migrate.upgrade(url)  # once more is nothing
    assert tables(tmp_path / "100% x.db") == wanted


def test_the_tables_are_what_the_migrations_make(url: str) -> None:
    migrate.upgrade(url)
    command.check(migrate.config(url))


async def test_foreign_keys_are_on_for_both_kinds_of_engine(database: Database, settings: Settings) -> None:
    with pytest.raises(IntegrityError):
        async with database.begin() as session:
            await events.append(session, project_id="p", job_id="ftjob-unknown", message="x")
    engine = create_sync(settings.database)
    with engine.begin() as connection:
        assert connection.scalar(text("PRAGMA foreign_keys")) == 1
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
    engine.dispose()


async def test_writers_queue_instead_of_failing(database: Database) -> None:
    async with database.begin() as session:
        await session.execute(text("CREATE TABLE tally (n INTEGER)"))
        await session.execute(text("INSERT INTO tally VALUES (0)"))

    async def add() -> None:
        async with database.begin() as session:
            found = await session.scalar(text("SELECT n FROM tally"))
            await session.execute(text("UPDATE tally SET n = :n"), {"n": (found or 0) + 1})

    await asyncio.gather(*(add() for _ in range(20)))
    async with database.read() as session:
        assert await session.scalar(text("SELECT n FROM tally")) == 20


async def test_a_reader_does_not_wait_for_a_writer(database: Database) -> None:
    async with database.begin() as session:
        await session.execute(text("CREATE TABLE tally (n INTEGER)"))
        async with asyncio.timeout(2), database.read() as reader:
            assert await reader.scalar(text("SELECT count(*) FROM jobs")) == 0


async def test_an_error_rolls_everything_back(database: Database, settings: Settings) -> None:
    async def half() -> None:
        async with database.begin() as session:
            await session.execute(text("CREATE TABLE half (n INTEGER)"))
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        await half()
    assert "half" not in tables(Path(settings.root / "hone.db"))
