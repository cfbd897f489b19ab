"""What a run keeps for good, its checkpoints and its result file: stored again and again while storage is away.

Does not cover: traces (`workers.rollouts.shipping`). Training goes on meanwhile. A store that stays away raises
StorageUnavailable in the end, which pauses the job (`workers.supervisor`): a resume makes the checkpoint again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TypeVar

from app.checkpoints import store
from app.storage.base import ObjectStore
from app.storage.errors import StorageUnavailable
from app.storage.thread import in_thread

log = logging.getLogger("hone.storing")

T = TypeVar("T")

PATIENCE_S = 600.0
PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0)  # after the tries of `app.storage.remote` itself; the last one repeats


async def persist(work: Callable[[], T]) -> T:
    """Do it in a thread; again while storage does not answer. Raises `StorageUnavailable` after `PATIENCE_S`."""
    ends = time.monotonic() + PATIENCE_S
    pauses = chain(PAUSES_S, repeat(PAUSES_S[-1]))
    while True:
        try:
            return await in_thread(work)
        except StorageUnavailable as error:
            pause = next(pauses)
            if time.monotonic() + pause > ends:
                raise
            log.warning("%s; again in %.0f s", error, pause)
            await asyncio.sleep(pause)


class Checkpoints:
    """Of one attempt."""

    def __init__(self, kept: ObjectStore, root: Path, job_id: str, attempt: int) -> None:
        self._store = kept
        self._root = root
        self._job_id, self._attempt = job_id, attempt

    async def publish(self, adapter: Path, step: int, facts: Mapping[str, Any]) -> tuple[Path, str]:
        """Directory and digest, once all of it is in storage; a row may name it from here on."""
        key = store.key_of(self._job_id, self._attempt, step)
        directory = self._root / key
        sha256 = await asyncio.to_thread(store.publish, adapter, directory, dict(facts))
        await persist(lambda: store.upload(self._store, directory, key))
        return directory, sha256
