"""One set of GPUs and the one job at a time that uses it: rung for, or found by looking.

Does not cover: the message (`workers.tasks`) and the duties beside it (`workers.janitor`). Looking makes good whatever
the broker loses; a ring only spares the wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from app.core.settings import Settings
from app.core.states import JobStatus
from app.db.engine import Database
from app.db.tables import Job
from app.jobs import leases
from app.jobs.doorbell import queue_of
from app.jobs.validation_service import validate_job
from app.models.catalogue import Catalogue
from workers.daemon import Daemon
from workers.doors import GRACE_S, SUPERVISOR, bury, has_room, not_started, start_supervisor
from workers.leftovers import end_leftovers
from workers.presence import Presence
from workers.starts import Starts

log = logging.getLogger("hone.slot")

LOOK_S = 5.0  # between two looks at the queue: the longest wait after a lost message
WATCH_S = 0.2  # between two looks at a running supervisor


class Slot(Daemon):
    poll_s = LOOK_S

    def __init__(
        self,
        settings: Settings,
        queues: frozenset[str],
        *,
        owner: str,
        environment: Mapping[str, str],
        command: tuple[str, ...] = SUPERVISOR,
    ) -> None:
        """`owner` signs the lease under which files are read; `environment` and `command` are the supervisor's."""
        super().__init__()
        self.settings, self.queues, self.owner = settings, queues, owner
        self.environment, self.command = environment, command
        self.database = Database(settings.database)
        self.catalogue = Catalogue(settings.models_dir)
        self.taken = asyncio.Lock()
        self.starts = Starts()
        self.presence = Presence(self.database, "worker", settings.hostname)
        self.beating: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        self.beating = asyncio.create_task(self.keep_beating())

    async def keep_beating(self) -> None:
        """Beside the passes: one lasts as long as a job. The first beat makes the row."""
        while True:
            try:
                await self.presence.beat()
                await end_leftovers(self.database, self.settings)
            except SQLAlchemyError as error:
                log.warning("no sign of life: the database refused: %s", error)
            await asyncio.sleep(self.beat_s)

    async def tick(self) -> None:
        """Take what waits in our queues. The list grows old while a job runs; `take` looks at each row again."""
        async with self.database.read() as session:
            waiting = await leases.waiting(session)
        full: set[str] = set()  # models without room: nobody overtakes a job that waits for it
        for job in waiting:
            ours = queue_of(self.settings.queues, job.model) in self.queues and job.model not in full
            if ours and not await self.take(job.id):
                full.add(job.model)

    async def take(self, job_id: str) -> bool:
        """Once the slot is free: do what the row asks for, until it is done or we stop. False: there was no room."""
        async with self.taken:
            if self.stopping.is_set():
                return True
            if await self.status(job_id) == JobStatus.VALIDATING:
                await self.unless_stopped(
                    validate_job(self.database, self.settings, self.catalogue, job_id, self.owner)
                )
            may = self.starts.may_start(job_id) and not self.stopping.is_set()
            if may and await self.status(job_id) == JobStatus.QUEUED:
                if not await has_room(self.database, self.settings, job_id):
                    return False
                await self.supervise(job_id)
            return True

    async def status(self, job_id: str) -> str | None:
        async with self.database.read() as session:
            return await session.scalar(select(Job.status).where(Job.id == job_id))

    async def unless_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        doing, stopped = asyncio.ensure_future(work), asyncio.ensure_future(self.stopping.wait())
        await asyncio.wait((doing, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not doing.done():
            doing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await doing

    async def supervise(self, job_id: str) -> None:
        """From start to end; the end that we ask for when we stop puts the job back."""
        try:
            child = start_supervisor(self.settings, job_id, environment=self.environment, command=self.command)
        except OSError as error:
            await not_started(self.database, self.settings, job_id, self.starts, error)
            return
        try:
            while child.poll() is None and not self.stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.stopping.wait(), WATCH_S)
            if child.poll() is None:
                await asyncio.to_thread(child.stop, GRACE_S)
        finally:
            await bury(self.database, self.settings, job_id, child, self.starts)

    async def shut_down(self) -> None:
        async with self.taken:  # what a ring began ends first
            if self.beating is not None:
                self.beating.cancel()
                await asyncio.gather(self.beating, return_exceptions=True)
            try:
                await self.presence.leave()
            finally:
                await self.database.close()
