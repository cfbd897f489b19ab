"""The row that says a process is alive and which it is: read by `GET /healthz`, `hone doctor` and `workers.leftovers`.

Does not cover: leases of jobs (`workers.heartbeat`) and heartbeats of samplers (`workers.sampler.keeper`). There may be
any number of a kind on a host; the row of one that was killed is taken away by whoever sees that, or by its age.
"""

from __future__ import annotations

import os
from typing import Any

from sqlalchemy import Engine, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.ids import new_id
from app.db.engine import Database, now, rows_changed
from app.db.tables import DEFAULT_PROJECT, Worker
from workers import identity

FORGOTTEN_AFTER_S = 86400.0  # silence after which a row tells nothing any more: its host is gone, or was started anew


class Presence:
    """One row per running process. `job_id`: the job of a supervisor."""

    def __init__(self, database: Database, kind: str, host: str, job_id: str | None = None) -> None:
        self._database = database
        self.id = new_id(f"{kind}-")
        me = os.getpid()
        seen = identity.look(me)
        self._facts: dict[str, Any] = {
            "id": self.id,
            "project_id": DEFAULT_PROJECT,
            "kind": kind,
            "host": host,
            "place": identity.place(),
            "pid": me,
            "process_group": os.getpgrp(),
            "process_started": seen.started if seen else 0,
            "job_id": job_id,
        }

    async def announce(self) -> None:
        async with self._database.begin() as session:
            await self.enter(session)

    async def enter(self, session: AsyncSession) -> None:
        stamp = await session.scalar(select(now())) or 0.0
        await session.execute(insert(Worker).values(**self._facts, started_at=stamp, heartbeat=stamp))

    async def beat(self) -> None:
        """A sign of life. Makes the row where there is none: of one who was frozen for long it is forgotten."""
        async with self._database.begin() as session:
            if not await rows_changed(session, self._beat()):
                await self.enter(session)

    def beat_from_thread(self, engine: Engine) -> None:
        """The same on a synchronous connection, for the heartbeat thread; a row that is gone stays so."""
        with engine.begin() as connection:
            connection.execute(self._beat())

    async def trainer_started(self, pid: int) -> None:
        """Before it is told anything: from now on nobody but its pipe would know of its group."""
        seen = identity.look(pid)
        self._facts |= {"trainer_pid": pid, "trainer_started": seen.started if seen else 0}
        async with self._database.begin() as session:
            await rows_changed(session, update(Worker).where(Worker.id == self.id).values(**self._facts))

    async def leave(self) -> None:
        async with self._database.begin() as session:
            await session.execute(delete(Worker).where(Worker.id == self.id))

    def _beat(self) -> Any:
        return update(Worker).where(Worker.id == self.id).values(heartbeat=now())


async def forget_silent(session: AsyncSession) -> None:
    """Rows of processes that nobody on their host will ever take away."""
    await session.execute(delete(Worker).where(Worker.heartbeat < now() - FORGOTTEN_AFTER_S))
