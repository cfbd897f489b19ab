"""Clearing away what nobody needs: directories and checkpoint objects that no row names, old logs, old rows.

Does not cover: snapshots, batches and versions of a live run, which it removes itself (`workers.training`), and traces,
which have a limit of their own. One pass an hour for the whole installation: a row says whose turn it is.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.settings import Settings
from app.db.engine import Database
from app.retention import repository
from app.retention.repository import BATCH, Named
from app.storage.build import open_store
from app.storage.errors import StorageUnavailable
from workers import unnamed

log = logging.getLogger("hone.collection")

DUTY = "collection"
EVERY_S = 3600.0
LOOK_S = 60.0  # between two looks whether it is our turn
DAY_S = 86400.0
ROUNDS = 1000  # of `BATCH` rows in one pass


@dataclass(frozen=True)
class Collected:
    """directories: logs too. failed: what could not be removed and is tried again next time."""

    directories: int = 0
    bytes: int = 0
    objects: int = 0
    rows: int = 0
    failed: int = 0


class Collector:
    """One per process that keeps house; `kick` is cheap. `clock` is the one that stamps files."""

    def __init__(self, settings: Settings, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._database = database
        self._clock = clock
        self._looked_at = float("-inf")
        self._round: asyncio.Task[None] | None = None
        self._stopping = threading.Event()

    def kick(self) -> None:
        """Begin a pass beside the caller's loop if one may be due. Raises nothing: jobs do not wait for this."""
        if time.monotonic() - self._looked_at >= LOOK_S and (self._round is None or self._round.done()):
            self._looked_at = time.monotonic()
            self._round = asyncio.create_task(self._pass())

    async def close(self) -> None:
        """The thread that removes stops after what it is at."""
        self._stopping.set()
        if self._round is not None:
            self._round.cancel()
            await asyncio.gather(self._round, return_exceptions=True)

    async def _pass(self) -> None:
        try:
            await self.collect_if_due()
        except SQLAlchemyError as error:
            log.warning("collection: the database refused: %s", error)
        except Exception:  # a fault of ours; it must not end the process that runs jobs. The next hour tries again
            log.exception("collection: a pass failed")

    async def collect_if_due(self) -> Collected | None:
        """None: it is not our turn."""
        async with self._database.read() as session:
            if not await repository.is_due(session, DUTY):
                return None
        async with self._database.begin() as session:
            if not await repository.take_turn(session, DUTY, EVERY_S):
                return None
        return await self.collect()

    async def collect(self) -> Collected:
        """One pass. Rows first: none may name what is gone."""
        rows = await self._forget()
        async with self._database.read() as session:
            named = await repository.named(session, self._settings.collect_after_s)
        objects = await asyncio.to_thread(self._remove_objects, named)
        found = await asyncio.to_thread(self._remove_directories, named)
        done = Collected(found.directories, found.bytes, objects, rows, found.failed)
        if done != Collected():
            log.info("collected %s", done)
        return done

    async def _forget(self) -> int:
        settings = self._settings
        kept_s = settings.rows_kept_days * DAY_S
        forgets: tuple[Callable[[AsyncSession], Awaitable[int]], ...] = (
            lambda session: repository.forget_snapshots(session, settings.collect_after_s),
            lambda session: repository.forget_deliveries(session, kept_s),
            lambda session: repository.forget_wants(session, kept_s),
            repository.forget_idempotency_keys,
        )
        total = 0
        for forget in forgets:
            for _ in range(ROUNDS):
                async with self._database.begin() as session:
                    gone = await forget(session)
                total += gone
                if gone < BATCH:
                    break
        return total

    def _remove_directories(self, named: Named) -> Collected:
        removed = size = failed = 0
        for found in unnamed.find(self._settings, named, now=self._clock()):
            if self._stopping.is_set():
                break
            try:
                unnamed.remove(found)
            except (OSError, unnamed.Outside) as error:
                log.warning("%s is not needed any more and cannot be removed: %s", found.path, error)
                failed += 1
                continue
            log.info("removed %s (%d bytes): no row names it", found.path, found.bytes)
            removed, size = removed + 1, size + found.bytes
        return Collected(removed, size, failed=failed)

    def _remove_objects(self, named: Named) -> int:
        """Checkpoints in storage that no row names, of jobs that are over: an object does not tell its age."""
        if self._settings.storage_url is None:
            return 0
        removed = 0
        try:
            store = open_store(self._settings, "checkpoints")
            for entry in store.entries():
                job_id, _, rest = entry.key.partition("/")
                attempt, _, rest = rest.partition("/")
                standing = named.jobs.get(job_id)
                place = (job_id, attempt, rest.partition("/")[0])
                if self._stopping.is_set() or standing is None or not standing.over or place in named.checkpoints:
                    continue
                store.delete(entry.key)
                removed += 1
        except StorageUnavailable as error:
            log.warning("collection: %s", error)
        return removed
