"""Engines and sessions for SQLite (WAL) and PostgreSQL, async for programs and sync for the heartbeat thread.

Does not cover: who commits. A request or a worker operation owns its transaction; services only flush.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from sqlalchemy import URL, ColumnElement, CursorResult, Engine, Float, Update, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.expression import FunctionElement

from app.db.patient import PatientConnection

BUSY_TIMEOUT_S = 10


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
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        if parsed.database and parsed.database != ":memory:":
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_async_engine(url, async_creator=lambda: _patient(parsed))
        dialect = engine.sync_engine.dialect
        dialect.has_terminate = False
        dialect.do_terminate = dialect.do_close  # type: ignore[method-assign]  # a second, forced close would not wait
        _prepare_sqlite(engine.sync_engine)
        return engine
    return create_async_engine(url, pool_pre_ping=True)


def _patient(url: URL) -> PatientConnection:
    """To be awaited."""
    args, options = url.get_dialect()().create_connect_args(url)
    connect = partial(sqlite3.connect, *args, **{**options, "timeout": BUSY_TIMEOUT_S})
    connection = PatientConnection(connect, iter_chunk_size=64)
    connection._thread.daemon = True  # as SQLAlchemy does: a process must not hang on a connection it forgot
    return connection


def create_sync(url: str) -> Engine:
    """A synchronous engine on the same database, for the heartbeat thread and for migrations."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        engine = create_engine(parsed.set(drivername="sqlite"), connect_args={"timeout": BUSY_TIMEOUT_S})
        _prepare_sqlite(engine)
        return engine
    return create_engine(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True)


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _on_connect(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # we emit BEGIN ourselves
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Any) -> None:
        read_only = connection.get_execution_options().get("hone_read_only", False)
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


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
        self._read = async_sessionmaker(
            self.engine.execution_options(hone_read_only=True), expire_on_commit=False, autoflush=False
        )

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncSession]:
        """A writing transaction: committed at the end, rolled back on any error. Keep it short; no I/O inside."""
        async with self._write() as session, session.begin():
            yield session

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """A reading transaction: never blocks a writer, never commits."""
        async with self._read() as session:
            yield session

    async def close(self) -> None:
        await self.engine.dispose()
