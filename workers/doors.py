"""What every door does to run a job: start its supervisor as a process of its own, and bury it.

Does not cover: which jobs, how many and when (`workers.local` polls, `workers.slot` is rung), nor running one
(`workers.supervisor`, which itself wins or loses the claim).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

from app.core.settings import Settings
from app.db.engine import Database
from app.db.tables import Job
from app.jobs import leases
from workers.process import Child, spawn
from workers.starts import PUT_BACK, Starts

log = logging.getLogger("hone.door")

SUPERVISOR = (sys.executable, "-m", "workers.supervisor")
GRACE_S = 15.0  # for a supervisor to stop its trainer and put its job back


def start_supervisor(
    settings: Settings, job_id: str, *, environment: Mapping[str, str], command: tuple[str, ...] = SUPERVISOR
) -> Child:
    """`environment`: what comes on top of the settings, such as the GPUs it may use."""
    log.info("starting the supervisor of %s", job_id)
    return spawn(
        [*command, job_id],
        log=settings.logs_dir / f"{job_id}.supervisor.log",
        environment={**settings.environment(), **environment},
        trusted=True,
    )


async def has_room(database: Database, settings: Settings, job_id: str) -> bool:
    """Has the job's sampler adapter slots for it? If not, its row says so, and a process that cannot win is spared."""
    async with database.read() as session:
        job = await session.get(Job, job_id)
        if job is None:
            return False
        short = await leases.shortage(session, job, settings.sampler_max_adapters)
    if short is not None and short != job.queue_reason:
        async with database.begin() as session:
            await leases.note_queue_reason(session, job_id, short)
    return short is None


async def not_started(database: Database, settings: Settings, job_id: str, starts: Starts, error: OSError) -> None:
    """The system gave no process: the job waits and says so."""
    count, wait = starts.failed(job_id)
    log.error("no supervisor of %s can be started: %s; the next try is in %.0f s", job_id, error, wait)
    reason = f"no worker process can be started on {settings.hostname}: {error}; see `hone doctor` there"
    async with database.begin() as session:
        await leases.note_failed_start(session, job_id, reason=reason, first=count == 1)


async def bury(database: Database, settings: Settings, job_id: str, child: Child, starts: Starts) -> None:
    """After its end: its group goes, too, and nobody waits for a lease that it may have left."""
    code = child.poll()
    child.kill()  # a trainer must not outlive its supervisor
    count = 0
    if code is None or code in (0, PUT_BACK) or code < 0:  # a signal is somebody's will, not a fault of the host
        starts.took(job_id)
    else:
        count, wait = starts.failed(job_id)
        log.error("the supervisor of %s ended with code %d; the next start is in %.0f s", job_id, code, wait)
    async with database.begin() as session:
        if code not in (0, PUT_BACK):  # then it holds no lease; another host's worker of this number and name may
            await leases.expire(session, job_id, leases.owner_name(settings.hostname, child.pid))
        if count:
            reason = (
                f"its worker process on {settings.hostname} ended with code {code} before it took the job, "
                f"{count} in a row; see {job_id}.supervisor.log there, and `hone doctor`"
            )
            await leases.note_failed_start(session, job_id, reason=reason, first=count == 1)
