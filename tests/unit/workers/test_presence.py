"""The row that says that a process is alive, and which one it is."""

from __future__ import annotations

import os
from pathlib import Path

from sqlalchemy import delete, select, update

from app.db.engine import Database, create_sync, now
from app.db.tables import Worker
from workers import identity
from workers.presence import FORGOTTEN_AFTER_S, Presence, forget_silent


async def rows(database: Database) -> list[Worker]:
    async with database.read() as session:
        return list((await session.scalars(select(Worker).order_by(Worker.kind))).all())


async def test_any_number_of_a_kind_may_run_on_a_host_and_each_leaves_alone(database: Database) -> None:
    first, second = Presence(database, "runner", "here"), Presence(database, "runner", "here")
    for each in (first, second, Presence(database, "keeper", "here")):
        await each.announce()
    assert [row.kind for row in await rows(database)] == ["keeper", "runner", "runner"]
    await first.leave()
    assert [row.id for row in await rows(database) if row.kind == "runner"] == [second.id]


async def test_the_row_names_this_very_process(database: Database) -> None:
    await Presence(database, "supervisor", "here", "ftjob-1").announce()
    (row,) = await rows(database)
    assert (row.pid, row.process_group, row.job_id) == (os.getpid(), os.getpgrp(), "ftjob-1")
    assert row.place == identity.place() != ""
    assert row.process_started == int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) > 0


async def test_a_beat_is_by_the_databases_clock_whichever_thread_it_comes_from(database: Database) -> None:
    presence = Presence(database, "runner", "here")
    await presence.announce()
    engine = create_sync(database.url)
    for thread in (False, True):
        async with database.begin() as session:
            await session.execute(update(Worker).values(heartbeat=1.0))
        if thread:
            presence.beat_from_thread(engine)
        else:
            await presence.beat()
        (row,) = await rows(database)
        assert row.heartbeat >= row.started_at > 1e9
    engine.dispose()


async def test_who_was_forgotten_while_frozen_comes_back_with_its_trainer(database: Database) -> None:
    presence = Presence(database, "supervisor", "here", "ftjob-1")
    await presence.announce()
    await presence.trainer_started(os.getpid())
    async with database.begin() as session:
        await session.execute(delete(Worker))
    await presence.beat()
    (row,) = await rows(database)
    assert (row.id, row.trainer_pid, row.trainer_started) == (presence.id, os.getpid(), row.process_started)


async def test_only_what_is_silent_for_long_is_forgotten(database: Database) -> None:
    old, young = Presence(database, "runner", "here"), Presence(database, "runner", "there")
    for presence, age in ((old, FORGOTTEN_AFTER_S + 60), (young, FORGOTTEN_AFTER_S - 60)):
        await presence.announce()
        async with database.begin() as session:
            await session.execute(update(Worker).where(Worker.id == presence.id).values(heartbeat=now() - age))
    async with database.begin() as session:
        await forget_silent(session)
    assert [row.id for row in await rows(database)] == [young.id]
