"""The row that says a runner or a keeper is alive; `GET /healthz` and `hone doctor` read it.

Does not cover: leases of jobs (`workers.heartbeat`) and heartbeats of samplers (`workers.sampler.keeper`).
"""

from __future__ import annotations

import os

from sqlalchemy import delete, select, update

from app.core.ids import new_id
from app.db.engine import Database, now
from app.db.tables import DEFAULT_PROJECT, Process


class Presence:
    """One row per running process; rows of the same kind and host from before are removed at start."""

    def __init__(self, database: Database, kind: str, host: str) -> None:
        self._database = database
        self.id = new_id(f"{kind}-")
        self._kind = kind
        self._host = host

    async def announce(self) -> None:
        async with self._database.begin() as session:
            await session.execute(delete(Process).where(Process.kind == self._kind, Process.host == self._host))
            stamp = await session.scalar(select(now())) or 0.0
            session.add(
                Process(
                    id=self.id,
                    project_id=DEFAULT_PROJECT,
                    kind=self._kind,
                    host=self._host,
                    pid=os.getpid(),
                    started_at=stamp,
                    heartbeat=stamp,
                )
            )

    async def beat(self) -> None:
        async with self._database.begin() as session:
            await session.execute(update(Process).where(Process.id == self.id).values(heartbeat=now()))

    async def leave(self) -> None:
        async with self._database.begin() as session:
            await session.execute(delete(Process).where(Process.id == self.id))
