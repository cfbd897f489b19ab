"""The supervisor's process: `python -m workers.supervisor JOB` claims one job, runs it, and says how it ended.

Does not cover: the run itself (`workers.run`). It holds the lease, obeys SIGTERM and its leash by putting the job back,
and is the only writer of the run: a crash of the trainer costs at most the step it was in, within a crash budget.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import traceback

from app.core import logging as hone_logging
from app.core.settings import Settings
from app.db.engine import Database
from app.jobs import leases
from app.jobs.leases import Claim, LeaseLost
from app.samplers.errors import SamplerError
from app.storage.errors import StorageUnavailable
from workers import leash
from workers.budget import BudgetSpent
from workers.heartbeat import Heartbeat
from workers.identity import MARK
from workers.leftovers import SUPERVISOR, end_leftovers
from workers.presence import Presence
from workers.publication import PublicationUnproved
from workers.registry import Registry
from workers.rollouts.collector import spare_live_objects
from workers.run import Run
from workers.setup import JobFailure
from workers.starts import PUT_BACK
from workers.trainer_link import TrainerDied

log = logging.getLogger("hone.supervisor")

STOP_S = 3.0  # for a trainer to end by itself; one that is in a step has nothing to give that would be kept


async def supervise(settings: Settings, job_id: str, leash_fd: int | None) -> int:
    """Exit code: 0 the job ended or is somebody else's, `PUT_BACK` it was put back or failed by a crash."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if leash_fd is not None:
        leash.watch(leash_fd, lambda: loop.call_soon_threadsafe(stop.set))
    database = Database(settings.database)
    presence = Presence(database, SUPERVISOR, settings.hostname, job_id)
    try:
        await end_leftovers(database, settings)
        if stop.is_set():
            return 0
        async with database.begin() as session:
            claim = await leases.claim(
                session,
                job_id,
                owner=leases.owner_name(settings.hostname, os.getpid()),
                lease_s=settings.lease_seconds,
                adapter_slots=settings.sampler_max_adapters,
            )
            if claim is not None:
                await presence.enter(session)
        if claim is None:
            log.info("%s is not to be had", job_id)
            return 0
        with hone_logging.bound(job_id=job_id, attempt=claim.fence.attempt):
            log.info("claimed %s, attempt %d", job_id, claim.fence.attempt)
            code = await _run(settings, database, claim, presence, stop)
            await presence.leave()  # only now: a trainer that we could not end is for the next one to end
            return code
    finally:
        await database.close()


async def _run(settings: Settings, database: Database, claim: Claim, presence: Presence, stop: asyncio.Event) -> int:
    loop = asyncio.get_running_loop()
    lost: list[str] = []

    def on_lost(reason: str) -> None:
        # From the heartbeat's thread, perhaps with a hung loop: end the trainer here and now.
        lost.append(reason)
        run.trainer.kill_group()
        loop.call_soon_threadsafe(stop.set)

    heartbeat = Heartbeat(
        settings.database, claim.fence, settings.lease_seconds, on_lost, beside=presence.beat_from_thread
    )
    run = Run(settings, database, claim, heartbeat)
    run.trainer.use({MARK: presence.id})
    run.trainer.on_spawned = presence.trainer_started
    heartbeat.start()
    work = asyncio.create_task(run.execute())
    asked = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([work, asked], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        asked.cancel()
        await run.trainer.stop(0.0 if lost or _lost_lease(work) else STOP_S)
        if lost:
            log.warning("%s: %s", claim.job.id, lost[0])
            return 0
        return await _conclude(settings, database, claim, work)
    except LeaseLost:
        log.warning("%s belongs to somebody else now", claim.job.id)
        return 0
    finally:
        heartbeat.stop()
        await run.close()


def _lost_lease(work: asyncio.Task[None]) -> bool:
    """Cancelled, paused or taken by another: nobody waits for what the trainer is doing."""
    return not work.cancelled() and isinstance(work.exception(), LeaseLost)


async def _conclude(settings: Settings, database: Database, claim: Claim, work: asyncio.Task[None]) -> int:
    """Turn the way the run ended into the job's status. Raises `LeaseLost`."""
    if work.cancelled():
        async with database.begin() as session:
            await leases.release(session, claim.fence, reason="The worker was asked to stop")
        return PUT_BACK
    error = work.exception()
    if error is None:
        log.info("%s succeeded", claim.job.id)
        return 0
    if isinstance(error, LeaseLost):
        raise error
    if isinstance(error, PublicationUnproved):
        log.error("%s paused: %s", claim.job.id, error)
        async with database.begin() as session:
            await leases.pause(session, claim.fence, reason=error.message, data=dict(error.detail or {}))
        return 0
    if isinstance(error, BudgetSpent):
        log.warning("%s paused: %s", claim.job.id, error)
        async with database.begin() as session:
            await leases.pause(session, claim.fence, reason=str(error), data=error.data, level="warn")
        return 0
    if isinstance(error, StorageUnavailable):
        log.error("%s paused: %s", claim.job.id, error)
        async with database.begin() as session:
            await leases.pause(session, claim.fence, reason=f"{error}. Resume the job once it works again")
        return 0
    registry = Registry(database, claim.fence)
    if isinstance(error, JobFailure):
        log.error("%s failed: %s", claim.job.id, error)
        await registry.failed(error.code, error.message, error.param, error.detail)
        return 0
    detail = error.detail if isinstance(error, TrainerDied) else "".join(traceback.format_exception(error))[-4000:]
    log.error("%s: %s\n%s", claim.job.id, error, detail)
    async with database.begin() as session:
        crashes = await leases.crash_count(session, claim.fence) + 1
    expected = isinstance(error, TrainerDied | SamplerError)
    what = str(error) if expected else f"The worker crashed ({type(error).__name__}: {error})"
    if crashes >= settings.max_crashes:
        message = f"{what}; {crashes} crashes without a finished step in between"
        await registry.failed("worker_crashed", message, None, {"detail": detail})
        return PUT_BACK
    async with database.begin() as session:
        await leases.release(session, claim.fence, reason=what, crashes=crashes)
    return PUT_BACK


def main() -> int:
    parser = argparse.ArgumentParser(prog="workers.supervisor")
    parser.add_argument("job")
    parser.add_argument("--leash-fd", type=int, default=None)
    options = parser.parse_args()
    settings = Settings()
    hone_logging.configure(settings.log_format)
    spare_live_objects()
    return asyncio.run(supervise(settings, options.job, options.leash_fd))


if __name__ == "__main__":
    sys.exit(main())
