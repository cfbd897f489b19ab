"""The embedded runner: polls for jobs, reads their files, starts one supervisor process per job.

Does not cover: running a job (`workers.supervisor`). The production set-up replaces this door by a Celery task; both
lead to the same room, because the supervisor itself wins or loses the claim.
"""

from __future__ import annotations

import asyncio
import logging
import sys

from sqlalchemy.exc import SQLAlchemyError

from app.core.settings import Settings
from app.db.engine import Database
from app.jobs import leases, reconcile
from app.jobs.validation_service import validate_job
from app.models.catalogue import Catalogue
from workers.daemon import Daemon, main
from workers.presence import Presence
from workers.process import Child, spawn

log = logging.getLogger("hone.runner")

GRACE_S = 15.0  # for a supervisor to stop its trainer and put its job back


class Runner(Daemon):
    """One per host. `slots` supervisors at once."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.database = Database(settings.database)
        self.catalogue = Catalogue(settings.models_dir)
        self.presence = Presence(self.database, "runner", settings.hostname)
        self.children: dict[str, Child] = {}
        self.reading: dict[str, asyncio.Task[None]] = {}

    async def begin(self) -> None:
        await self.presence.announce()

    async def beat(self) -> None:
        await self.presence.beat()

    async def tick(self) -> None:
        """One pass: reap, take back what the dead held, read files, start supervisors."""
        for job_id, child in list(self.children.items()):
            if child.poll() is not None:
                child.kill()  # its group: a trainer must not outlive its supervisor
                del self.children[job_id]
                async with self.database.begin() as session:
                    await leases.expire(session, job_id, leases.owner_name(self.settings.hostname, child.pid))
        async with self.database.read() as session:
            unread = await leases.unvalidated(session)
            waiting = await leases.queued(session)
        async with self.database.begin() as session:
            await reconcile.take_back_expired(session, self.settings.max_crashes)
        for job_id in unread:
            if job_id not in self.reading:  # beside the loop: a large file must not delay it
                self.reading[job_id] = asyncio.create_task(self.read_files(job_id))
        for job_id in waiting:
            if len(self.children) < self.settings.runner_slots and job_id not in self.children:
                self.children[job_id] = self.start(job_id)

    async def read_files(self, job_id: str) -> None:
        try:
            await validate_job(self.database, self.settings, self.catalogue, job_id, self.presence.id)
        except SQLAlchemyError as error:
            log.warning("reading the files of %s: %s; they are read again when its lease ends", job_id, error)
        finally:
            del self.reading[job_id]

    def start(self, job_id: str) -> Child:
        log.info("starting the supervisor of %s", job_id)
        return spawn(
            [sys.executable, "-m", "workers.supervisor", job_id],
            log=self.settings.logs_dir / f"{job_id}.supervisor.log",
            environment=self.settings.environment(),
            trusted=True,
        )

    async def shut_down(self) -> None:
        for task in self.reading.values():
            task.cancel()
        await asyncio.gather(*self.reading.values(), return_exceptions=True)
        for child in self.children.values():
            child.terminate()
        await asyncio.gather(*(asyncio.to_thread(child.stop, GRACE_S) for child in self.children.values()))
        await self.presence.leave()
        await self.database.close()


if __name__ == "__main__":
    main("workers.local", Runner)
