"""The row that says a runner or a keeper is alive."""

from __future__ import annotations

import os

from sqlalchemy import select, update

from app.db.engine import Database
from app.db.tables import Process
from workers.presence import Presence


async def found(database: Database) -> list[tuple[str, str]]:
    async with database.read() as session:
        return sorted((row.kind, row.host) for row in (await session.scalars(select(Process))).all())


async def test_announcing_replaces_the_dead_of_the_same_kind_and_host_only(database: Database) -> None:
    for kind, host in (("runner", "here"), ("keeper", "here"), ("runner", "there"), ("runner", "here")):
        await Presence(database, kind, host).announce()
    assert await found(database) == [("keeper", "here"), ("runner", "here"), ("runner", "there")]


async def test_a_beat_is_by_the_databases_clock_and_leaving_is_at_once(database: Database) -> None:
    presence = Presence(database, "runner", "here")
    await presence.announce()
    async with database.begin() as session:
        await session.execute(update(Process).values(heartbeat=1.0))
    await presence.beat()
    async with database.read() as session:
        row = await session.get(Process, presence.id)
        assert row is not None
        assert row.heartbeat >= row.started_at > 1e9
        assert row.pid == os.getpid()
    await presence.leave()
    assert await found(database) == []
