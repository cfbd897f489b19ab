"""Engines and sessions for SQLite (WAL) and PostgreSQL, async for programs and sync for the heartbeat thread.

Does not cover: who commits. A request or a worker operation owns its transaction; services only flush.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from sqlalchemy import (
    URL,
    ColumnElement,
    CursorResult,
    Engine,
    Float,
    Update,
    create_engine,
    event,
    func,
    make_url,
    select,
)
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.expression import FunctionElement

from app.db.patient import PatientConnection

BUSY_TIMEOUT_S = 10


class UnsupportedDatabase(ValueError):
    """HONE_DATABASE_URL names neither SQLite nor PostgreSQL, or the driver of the latter is not installed."""


def async_url(url: str) -> URL:
    """`url` with the one driver we use for its kind of database, whatever driver it names.

    Raises UnsupportedDatabase, without the password in the message.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise UnsupportedDatabase(
            "the database URL cannot be read; it looks like postgresql://user@host/name"
        ) from None
    kind = parsed.get_backend_name()
    if kind == "sqlite":
        return parsed.set(drivername="sqlite+aiosqlite")
    if kind not in ("postgresql", "postgres"):
        raise UnsupportedDatabase(f"{kind!r} is not supported; use sqlite:// or postgresql://")
    if find_spec("psycopg") is None:
        raise UnsupportedDatabase("PostgreSQL needs its driver: pip install 'hone-rft[postgres]'")
    return parsed.set(drivername="postgresql+psycopg")


class db_now(FunctionElement[float]):
    """Seconds since the epoch by the *database's* clock: leases never trust a worker's (control plane §3.4)."""

    type = Float()
    inherit_cache = True


@compiles(db_now, "sqlite")
def _sqlite_now(element: Any, compiler: Any, **kw: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(db_now, "postgresql")
def _postgres_now(element: Any, compiler: Any, **kw: Any) -> str:
    return "extract(epoch from clock_timestamp())::float8"


def now() -> ColumnElement[float]:
    """`db_now()` typed as a column expression."""
    element: Any = db_now()
    return element  # type: ignore[no-any-return]


def create_async(url: str) -> AsyncEngine:
    """An async engine; on SQLite every transaction begins IMMEDIATE so that writers queue instead of failing."""
    parsed = async_url(url)
    if parsed.get_backend_name() == "sqlite":
        if parsed.database and parsed.database != ":memory:":
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_async_engine(parsed, async_creator=lambda: _patient(parsed))
        dialect = engine.sync_engine.dialect
        dialect.has_terminate = False
        dialect.do_terminate = dialect.do_close  # type: ignore[method-assign]  # a second, forced close would not wait
        _prepare_sqlite(engine.sync_engine)
        return engine
    from app.db import postgres  # late: its driver is an extra

    made = create_async_engine(parsed, **postgres.OPTIONS)
    postgres.prepare(made.sync_engine)
    return made


def _patient(url: URL) -> PatientConnection:
    """To be awaited."""
    args, options = url.get_dialect()().create_connect_args(url)
    connect = partial(sqlite3.connect, *args, **{**options, "timeout": BUSY_TIMEOUT_S})
    connection = PatientConnection(connect, iter_chunk_size=64)
    connection._thread.daemon = True  # as SQLAlchemy does: a process must not hang on a connection it forgot
    return connection


def create_sync(url: str) -> Engine:
    """A synchronous engine on the same database, for the heartbeat thread and for migrations."""
    parsed = async_url(url)
    if parsed.get_backend_name() == "sqlite":
        engine = create_engine(parsed.set(drivername="sqlite"), connect_args={"timeout": BUSY_TIMEOUT_S})
        _prepare_sqlite(engine)
        return engine
    from app.db import postgres  # late: its driver is an extra

    engine = create_engine(parsed, **postgres.OPTIONS)
    postgres.prepare(engine)
    return engine


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _on_connect(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # we emit BEGIN ourselves
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")  # an acknowledged commit outlives a power cut, as files do
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Any) -> None:
        read_only = connection.get_execution_options().get("hone_read_only", False)
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


async def alone(session: AsyncSession, what: str) -> None:
    """Until the end of this transaction no other that calls this with the same `what` goes on.

    For a decision over rows that cannot be locked one by one, such as a sum. SQLite's writers are alone anyway.
    """
    if session.get_bind().dialect.name == "postgresql":
        await session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(what, 0))))


async def rows_changed(session: AsyncSession, statement: Update) -> int:
    """Run an UPDATE whose WHERE decides a race; the count says who won."""
    result = await session.execute(statement.execution_options(synchronize_session=False))
    return cast(CursorResult[Any], result).rowcount


class Database:
    """One engine and its two kinds of transaction."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = create_async(url)
        self._write = async_sessionmaker(self.engine, expire_on_commit=False)
        reading: dict[str, Any] = {"hone_read_only": True}
        if self.engine.dialect.name == "postgresql":  # one moment for all statements, as SQLite's readers see it
            reading |= {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        self._read = async_sessionmaker(
            self.engine.execution_options(**reading), expire_on_commit=False, autoflush=False
        )

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncSession]:
        """A writing transaction: committed at the end, rolled back on any error. Keep it short; no I/O inside."""
        async with self._write() as session, session.begin():
            yield session

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """A reading transaction: all its queries see one moment; never blocks a writer, never commits."""
        async with self._read() as session:
            yield session

    async def close(self) -> None:
        await self.engine.dispose()
