"""Brings a job's trace files to storage as their steps end, and keeps them all below a size, oldest steps first.

Does not cover: writing them (`recorder`). Nothing here ends a run: what cannot be stored now is tried again, and until
then it is read from this disk.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from app.storage.base import ObjectStore
from app.storage.errors import StorageUnavailable
from app.storage.local import LocalStore
from app.storage.thread import in_thread

log = logging.getLogger("hone.traces")

LOOK_S = 2.0
RETRY_S = 30.0  # a pass on a store that is away has waited already (`app.storage.remote`)
MB = 1024**2
_FILE = re.compile(r"[^/]+/a(?P<attempt>\d+)/step-(?P<step>\d+)(?P<valid>-valid)?\.jsonl\.zst")


@dataclass(frozen=True, order=True)
class TraceFile:
    """Sorted by age. `valid`: of the validation after that step, which runs beside the next one."""

    step: int
    attempt: int
    valid: bool
    key: str

    @classmethod
    def of(cls, key: str) -> TraceFile | None:
        found = _FILE.fullmatch(key)
        return found and cls(int(found["step"]), int(found["attempt"]), found["valid"] is not None, key)

    def written(self, attempt: int, step: int) -> bool:
        """Is it complete, now that `attempt` has recorded `step`? A rollout that ends late makes it grow again."""
        return self.attempt != attempt or self.step + self.valid <= step


class Shipping:
    """One per run. `limit`: bytes, 0 for none."""

    def __init__(self, store: ObjectStore, traces_dir: Path, job_id: str, attempt: int, limit: int) -> None:
        self._store = store
        self._here = LocalStore(traces_dir)
        self._job_id, self._attempt = job_id, attempt
        self._limit = limit
        self._stored: dict[str, int] | None = None  # bytes by key, in storage
        self._passing = asyncio.Lock()

    async def run(self, step: Callable[[], int]) -> None:
        """A pass whenever `step()`, the last recorded one, has moved; until cancelled."""
        seen: int | None = None
        while True:
            pause = LOOK_S
            if (now := step()) != seen:
                try:
                    await self.ship(now)
                    seen = now
                except StorageUnavailable as error:
                    log.warning("traces of %s stay on this disk for now: %s", self._job_id, error)
                    pause = RETRY_S
            await asyncio.sleep(pause)

    async def ship(self, step: int) -> None:
        """Everything up to `step`, and what other attempts left on this disk. Raises `StorageUnavailable`."""
        async with self._passing:
            await in_thread(self._ship, step, self._limit)

    async def finish(self, *, over: bool) -> None:
        """After the last rollout: the rest. With `over`, nobody writes any more and the copies on this disk go."""
        try:
            async with self._passing:
                await in_thread(self._ship, None, self._limit if over else 0)
                if over:
                    await in_thread(self._drop_copies)
        except StorageUnavailable as error:
            log.warning("traces of %s stay on this disk: %s", self._job_id, error)

    # --- blocking ---------------------------------------------------------------------------------------------------

    def _ship(self, step: int | None, limit: int) -> None:
        if self._stored is None:
            self._stored = _sizes(self._store, self._job_id)
        here = _sizes(self._here, self._job_id)
        for file in _files(here):
            written = step is None or file.written(self._attempt, step)
            if written and self._stored.get(file.key) != here[file.key]:
                self._store.put(self._here.local(file.key), file.key)
                self._stored[file.key] = here[file.key]
        if limit:
            self._remove_oldest({**here, **self._stored}, step, limit)

    def _remove_oldest(self, sizes: Mapping[str, int], step: int | None, limit: int) -> None:
        """The newest step that is recorded stays, whatever its size."""
        assert self._stored is not None
        files = _files(sizes)
        newest = step if step is not None else max((file.step for file in files), default=0)
        excess = sum(sizes.values()) - limit
        for file in files:
            if excess <= 0 or file.step >= newest:
                return
            self._store.delete(file.key)
            self._here.delete(file.key)
            self._stored.pop(file.key, None)
            excess -= sizes[file.key]
            log.info("removed %s: the traces of this job are above %d MB", file.key, limit // MB)

    def _drop_copies(self) -> None:
        assert self._stored is not None
        for key, size in _sizes(self._here, self._job_id).items():
            path = self._here.local(key)
            if self._stored.get(key) == size and self._store.local(key) != path:
                path.unlink(missing_ok=True)


def _sizes(store: ObjectStore, job_id: str) -> dict[str, int]:
    return {entry.key: entry.bytes for entry in store.entries(job_id)}


def _files(sizes: Mapping[str, int]) -> list[TraceFile]:
    """Oldest first; what is no trace file is left alone."""
    return sorted(file for file in map(TraceFile.of, sizes) if file is not None)
