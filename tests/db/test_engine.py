"""URLs, and transactions of tasks that are cancelled. Does not cover: what is written in them."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text

from app.db.engine import Database, UnsupportedDatabase, async_url

SLOW = text("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300000) SELECT count(*) FROM n")


async def test_a_transaction_that_is_cancelled_twice_leaves_nothing_that_waits(database: Database) -> None:
    before = asyncio.all_tasks()

    async def work() -> None:
        async with database.begin() as session:
            await session.execute(SLOW)

    for pause in (0.0, 0.002, 0.01, 0.03):
        task = asyncio.create_task(work())
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.sleep(pause)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    left = asyncio.all_tasks() - before
    if left:
        await asyncio.wait(left, timeout=5)
    assert not [task for task in left if not task.done()]
    async with database.begin() as session:  # and nobody holds the write lock
        assert await session.scalar(text("SELECT 1")) == 1


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("postgresql://u:p@host:5433/hone?sslmode=require", "postgresql+psycopg://u:p@host:5433/hone?sslmode=require"),
        ("postgres://host/hone", "postgresql+psycopg://host/hone"),
        ("postgresql+asyncpg://host/hone", "postgresql+psycopg://host/hone"),
        ("postgresql+psycopg://host/hone", "postgresql+psycopg://host/hone"),
        ("sqlite:////data/hone.db", "sqlite+aiosqlite:////data/hone.db"),
    ],
)
def test_a_url_gets_the_driver_that_we_use(given: str, used: str) -> None:
    assert async_url(given).render_as_string(hide_password=False) == used


@pytest.mark.parametrize(
    ("given", "says"),
    [("mysql://root:hunter2@host/hone", "'mysql' is not supported"), ("hunter2@host", "looks like postgresql://")],
)
def test_a_url_that_cannot_be_used_says_why_without_its_password(given: str, says: str) -> None:
    with pytest.raises(UnsupportedDatabase, match=says) as caught:
        async_url(given)
    assert "hunter2" not in str(caught.value)


def test_without_the_driver_of_postgresql_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.db.engine.find_spec", lambda name: None)
    with pytest.raises(UnsupportedDatabase, match=r"hone-rft\[postgres\]"):
        async_url("postgresql://host/hone")
