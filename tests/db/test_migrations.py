"""The real migrations on both databases: up, down, up; no drift from the tables; what makes transactions safe."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

from app.core.settings import Settings
from app.db import migrate
from app.db.engine import Database, create_sync
from app.db.tables import Base
from app.jobs import events


def tables(url: str) -> set[str]:
    engine = create_sync(url)
    found = set(inspect(engine).get_table_names())
    engine.dispose()
    return found


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without any table."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / '100% x.db'}"
    return str(request.getfixturevalue("postgres").create_database(migrated=False))


def test_up_down_and_up_again(url: str) -> None:
    wanted = set(Base.metadata.tables) | {"alembic_version"}
    migrate.upgrade(url)
    assert tables(url) == wanted
    migrate.downgrade(url, "base")
    assert tables(url) == {"alembic_version"}
    migrate.upgrade(url)
    migrate.upgrade(url)  # once more is nothing
    assert tables(url) == wanted


def test_the_tables_are_what_the_migrations_make(url: str) -> None:
    migrate.upgrade(url)
    command.check(migrate.config(url))


def constraints(url: str) -> set[str]:
    """Names of CHECK, UNIQUE and foreign-key constraints, and of indexes."""
    engine = create_sync(url)
    looked_at = inspect(engine)
    found = {
        str(each["name"])
        for table in Base.metadata.tables
        for kind in ("check_constraints", "unique_constraints", "foreign_keys", "indexes")
        for each in getattr(looked_at, f"get_{kind}")(table)
    }
    engine.dispose()
    return found


def test_every_constraint_is_on_both_databases(url: str) -> None:
    migrate.upgrade(url)
    declared = {
        str(each.name)
        for table in Base.metadata.tables.values()
        for each in (*table.constraints, *table.indexes)
        if not str(each.name).startswith("pk_")
    }
    assert declared - constraints(url) == set()


def test_of_processes_that_start_together_one_migrates_and_the_others_wait(url: str) -> None:
    holds = "SELECT 1"  # our engine begins IMMEDIATE
    if not url.startswith("sqlite"):
        holds = "SELECT pg_advisory_xact_lock(hashtext('hone migrations'))"
    engine = create_sync(url)
    with engine.connect() as first:
        first.execute(text(holds))
        second = threading.Thread(target=migrate.upgrade, args=(url,))
        second.start()
        second.join(0.5)
        assert second.is_alive()
        first.rollback()
    second.join(20)
    engine.dispose()
    assert "jobs" in tables(url)


async def test_foreign_keys_hold_for_both_kinds_of_engine(database: Database, settings: Settings) -> None:
    with pytest.raises(IntegrityError):
        async with database.begin() as session:
            await events.append(session, project_id="p", job_id="ftjob-unknown", message="x")
    engine = create_sync(settings.database)
    insert = text("INSERT INTO sampler_adapters VALUES ('gone', 'x', 'p', '/x', 0, 0)")
    with pytest.raises(IntegrityError), engine.begin() as connection:
        connection.execute(insert)
    engine.dispose()


async def test_writers_of_a_row_queue_instead_of_failing(database: Database) -> None:
    async with database.begin() as session:
        await session.execute(text("CREATE TABLE tally (n INTEGER)"))
        await session.execute(text("INSERT INTO tally VALUES (0)"))

    async def add() -> None:
        async with database.begin() as session:
            await session.execute(text("UPDATE tally SET n = n + 1"))

    await asyncio.gather(*(add() for _ in range(20)))
    async with database.read() as session:
        assert await session.scalar(text("SELECT n FROM tally")) == 20


async def test_a_reader_neither_waits_for_a_writer_nor_sees_it_halfway(database: Database) -> None:
    async with database.begin() as session:
        await session.execute(text("CREATE TABLE tally (n INTEGER)"))
    async with asyncio.timeout(5), database.read() as reader:
        assert await reader.scalar(text("SELECT count(*) FROM tally")) == 0
        async with database.begin() as session:
            await session.execute(text("INSERT INTO tally VALUES (1)"))
            assert await reader.scalar(text("SELECT count(*) FROM tally")) == 0
        assert await reader.scalar(text("SELECT count(*) FROM tally")) == 0  # all its queries see one moment
    async with database.read() as reader:
        assert await reader.scalar(text("SELECT count(*) FROM tally")) == 1


async def test_an_error_rolls_everything_back(database: Database) -> None:
    async def half() -> None:
        async with database.begin() as session:
            await session.execute(text("CREATE TABLE half (n INTEGER)"))
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        await half()
    with pytest.raises((OperationalError, ProgrammingError), match="half"):
        async with database.read() as session:
            await session.execute(text("SELECT * FROM half"))
