"""The duties without a GPU: read new jobs' files, take back what the dead held, ring, send webhooks, clear away.

Does not cover: starting jobs (`workers.local`, `workers.slot`). Any number of copies may run: each duty is a lease or a
conditional UPDATE.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from sqlalchemy.exc import SQLAlchemyError

from app.core.settings import Settings
from app.db.engine import Database
from app.jobs import leases, reconcile
from app.jobs.doorbell import make_doorbell
from app.jobs.validation_service import validate_job
from app.models.catalogue import Catalogue
from app.webhooks.delivery import Courier
from workers.collection import Collector
from workers.daemon import Daemon, main
from workers.leftovers import end_leftovers
from workers.presence import Presence, forget_silent

log = logging.getLogger("hone.runner")


class Housekeeping(Daemon):
    """Subclasses say what becomes of the jobs that wait for a worker."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.database = Database(settings.database)
        self.catalogue = Catalogue(settings.models_dir)
        self.presence = Presence(self.database, "runner", settings.hostname)
        self.reading: dict[str, asyncio.Task[None]] = {}
        self.courier = Courier.of(settings, self.database)
        self.collector = Collector(settings, self.database)

    async def begin(self) -> None:
        await self.presence.announce()

    async def beat(self) -> None:
        await self.presence.beat()
        async with self.database.begin() as session:
            await forget_silent(session)
        await end_leftovers(self.database, self.settings)

    async def attend(self, waiting: Sequence[leases.Waiting]) -> None:
        """One pass over the queued jobs, oldest first."""
        raise NotImplementedError

    async def tick(self) -> None:
        """One pass: take back what the dead held, read files, attend to the queue."""
        async with self.database.read() as session:
            unread = await leases.unvalidated(session)
            waiting = await leases.waiting(session)
        async with self.database.begin() as session:
            await reconcile.take_back_expired(session, self.settings.max_crashes)
        for job_id in unread:
            if job_id not in self.reading:  # beside the loop: a large file must not delay it
                self.reading[job_id] = asyncio.create_task(self.read_files(job_id))
        await self.attend(waiting)
        self.courier.kick()
        self.collector.kick()

    async def read_files(self, job_id: str) -> None:
        try:
            await validate_job(self.database, self.settings, self.catalogue, job_id, self.presence.id)
        except SQLAlchemyError as error:
            log.warning("reading the files of %s: %s; they are read again when its lease ends", job_id, error)
        finally:
            del self.reading[job_id]

    async def shut_down(self) -> None:
        for task in self.reading.values():
            task.cancel()
        await asyncio.gather(*self.reading.values(), return_exceptions=True)
        await self.courier.close()
        await self.collector.close()
        await self.presence.leave()
        await self.database.close()


class Janitor(Housekeeping):
    """Beside Celery's workers."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.bell = make_doorbell(settings)
        self.rung: frozenset[str] = frozenset()

    async def attend(self, waiting: Sequence[leases.Waiting]) -> None:
        """Ring once for each time a job joins the queue: rings repeated for hours fill Redis, and workers look."""
        for job in waiting:
            if job.id not in self.rung:
                self.bell.ring(job.id, job.model)
        self.rung = frozenset(job.id for job in waiting)

    async def shut_down(self) -> None:
        await asyncio.to_thread(self.bell.close)
        await super().shut_down()


if __name__ == "__main__":
    main("workers.janitor", Janitor)
