"""What killed supervisors left behind on this host: their trainers' processes are ended, rows of the dead taken away.

Does not cover: the job, which goes back to the queue when its lease ends (`app.jobs.reconcile`, `workers.doors`). As a
rule a trainer ends when its supervisor does; this is for one that cannot, hung in a driver with the GPU in its hands.
"""

from __future__ import annotations

import asyncio
import logging

from sqlalchemy import delete, select

from app.core.settings import Settings
from app.db.engine import Database, now
from app.db.tables import Worker
from workers import identity

log = logging.getLogger("hone.leftovers")

SUPERVISOR = "supervisor"
# A supervisor that has not beaten for so long has lost its job, alive or not; one that winds up needs less.
FROZEN_LEASES, FROZEN_AT_LEAST_S = 2.0, 60.0


async def end_leftovers(database: Database, settings: Settings) -> None:
    """For before a supervisor's start, and for now and then: a job that was cancelled has no next start.

    Judges rows of this boot and this pid namespace only: elsewhere process ids mean nothing here.
    """
    here = identity.place()
    if not here:
        return
    limit_s = max(FROZEN_LEASES * settings.lease_seconds, FROZEN_AT_LEAST_S)
    async with database.read() as session:
        query = select(Worker, now() - Worker.heartbeat).where(Worker.place == here)
        rows = [(row, silence) for row, silence in await session.execute(query)]
    for row, silence in rows:
        frozen = row.kind == SUPERVISOR and silence > limit_s
        if frozen or not identity.is_alive(row.pid, row.process_started):
            await _end(database, row)


async def _end(database: Database, row: Worker) -> None:
    if row.kind == SUPERVISOR:
        try:
            for pid in await asyncio.to_thread(_end_groups, row):
                log.warning("the process group %d was left behind by a supervisor of %s: ended", pid, row.job_id)
        except identity.Undead as error:
            log.error("left behind by a supervisor of %s: %s", row.job_id, error)  # the row stays, for another try
            return
    async with database.begin() as session:
        await session.execute(delete(Worker).where(Worker.id == row.id))


def _end_groups(row: Worker) -> list[int]:
    """The groups that had to be ended. Blocking. Raises `Undead`."""
    groups = [(row.trainer_pid, row.trainer_started)]
    if row.process_group == row.pid:  # else it is another's group: a shell's, a test's
        groups.append((row.pid, row.process_started))
    return [pid for pid, at in groups if pid is not None and at is not None and identity.end_group(pid, at, row.id)]
