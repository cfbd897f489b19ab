"""Transactions of tasks that are cancelled. Does not cover: what is written in them."""

from __future__ import annotations

import asyncio

from sqlalchemy import text

from app.db.engine import Database

SLOW = text("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300000) SELECT count(*) FROM n")


async def test_a_transaction_that_is_cancelled_twice_leaves_nothing_that_waits(database: Database) -> None:
    if database.engine.dialect.name != "sqlite":
        return  # the fault was aiosqlite's
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
