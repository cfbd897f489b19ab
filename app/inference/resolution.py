"""From a model name in a request to what answers it: base model, adapter, renderer.

Does not cover: where it is served (`app.samplers`). Answers are kept for a few seconds, because an evaluation asks for
the same name hundreds of times; an unknown name is looked up each time, so that a model is there once its job ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from app.checkpoints.library import Reference
from app.checkpoints.store import CorruptCheckpoint
from app.core.errors import NotFound, ServiceError
from app.db.engine import Database
from app.inference.repository import find_tuned
from app.models.catalogue import BaseModel, BrokenModel, Catalogue, UnknownModel, unusable
from app.rendering.protocol import ChatRenderer, NoRenderer
from app.samplers.service import Adapter
from app.storage.thread import in_thread

log = logging.getLogger(__name__)

KEEP_S = 5.0
MAX_KEPT = 1024


class ModelBroken(ServiceError):
    """The model is known and cannot be used; a retry does not mend it, an operator does."""


@dataclass(frozen=True)
class Target:
    """What answers a request. adapter None: the base model itself."""

    base: BaseModel
    adapter: Adapter | None
    renderer: ChatRenderer


class Resolver:
    """Names to targets, for one process.

    `load_renderer` may read a tokenizer from disk and `locate` fetch an adapter from storage: they run in threads.
    """

    def __init__(
        self,
        database: Database,
        catalogue: Catalogue,
        load_renderer: Callable[[BaseModel], ChatRenderer],
        locate: Callable[[Reference], Path],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._catalogue = catalogue
        self._load_renderer = load_renderer
        self._locate = locate
        self._clock = clock
        self._kept: dict[tuple[str, str], tuple[float, Target]] = {}
        # One look-up of a name at a time: the hundred requests behind it find it kept.
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    async def resolve(self, project_id: str, name: str) -> Target:
        """Raises NotFound (`model_not_found`, param `model`), ModelBroken when its files cannot be used, and
        StorageUnavailable."""
        key = (project_id, name)
        if (target := self._fresh(key)) is not None:
            return target
        async with self._locks.setdefault(key, asyncio.Lock()):
            if (target := self._fresh(key)) is not None:
                return target
            target = await self._look_up(project_id, name)
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            self._kept[key] = (self._clock() + KEEP_S, target)
            return target

    def _fresh(self, key: tuple[str, str]) -> Target | None:
        until, target = self._kept.get(key, (0.0, None))
        return target if until > self._clock() else None

    async def _look_up(self, project_id: str, name: str) -> Target:
        base = await self._base(name)
        if base is not None:
            return Target(base, None, await self._renderer(base))
        async with self._database.read() as session:
            tuned = await find_tuned(session, project_id, name)
        if tuned is None:
            raise NotFound(
                f"The model `{name}` does not exist or you do not have access to it.",
                param="model",
                code="model_not_found",
            )
        base = await self._base(tuned.base_model)
        if base is None:
            raise NotFound(
                f"The model `{name}` needs the base model `{tuned.base_model}`, which is not installed any more; "
                f"install it with `hone models pull`.",
                param="model",
                code="model_not_found",
            )
        path = await self._path(name, tuned.files)
        return Target(base, Adapter(name=tuned.checkpoint_id, path=str(path)), await self._renderer(base))

    async def _base(self, name: str) -> BaseModel | None:
        try:
            return await asyncio.to_thread(self._catalogue.get, name)
        except UnknownModel:
            return None
        except BrokenModel as error:
            raise _broken(name, error) from error

    async def _path(self, name: str, files: Reference) -> Path:
        try:
            return await in_thread(self._locate, files)
        except CorruptCheckpoint as error:
            raise _broken(name, error) from error

    async def _renderer(self, base: BaseModel) -> ChatRenderer:
        try:
            return await asyncio.to_thread(self._load_renderer, base)
        except NoRenderer as error:
            raise _broken(base.id, error) from error


def _broken(name: str, error: Exception) -> ModelBroken:
    log.error("the model %s cannot be used: %s", name, error)
    return ModelBroken(unusable(name), param="model")
