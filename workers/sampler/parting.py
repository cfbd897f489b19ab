"""Versions on their way out: unloaded when no turn names them, their directories deleted when nobody can read them.

A directory that is deleted while an engine still has its name or a request for it kills vLLM, so each step waits for
the one before, and whatever did not answer is asked again at the next look.
Does not cover: when a version is retired (`workers.training`).
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from app.db.engine import Database
from app.samplers import repository
from app.samplers.errors import ModelNotServed, SamplerError
from app.samplers.service import Adapter, LiveSampler, Samplers

log = logging.getLogger("hone.policy")

LETS_GO_S = 1.0  # an engine is still at a request whose connection was closed; vLLM noticed after 0.05 s


@dataclass(frozen=True)
class Leaving:
    version: int
    adapter: Adapter


class Parting:
    """One per run; `holds` notes every sampler that was ever asked to load a version."""

    def __init__(self, samplers: Samplers, database: Database, base_model: str, holder: str) -> None:
        self._samplers = samplers
        self._database = database
        self._base_model = base_model
        self._holder = holder
        self._holders: dict[str, dict[str, LiveSampler]] = {}  # adapter name → sampler id → sampler
        self._leaving: list[Leaving] = []
        self._cut_at: dict[int, float] = {}  # version → when a turn on it last broke off (monotonic)
        self._lock = asyncio.Lock()

    def holds(self, sampler: LiveSampler, adapter: Adapter) -> None:
        self._holders.setdefault(adapter.name, {})[sampler.id] = sampler

    def cut(self, version: int) -> None:
        """A turn on this version was cancelled or failed just now."""
        self._cut_at[version] = time.monotonic()

    def add(self, version: int, adapter: Adapter) -> None:
        self._leaving.append(Leaving(version, adapter))

    async def see_off(self, asking: Mapping[int, int]) -> None:
        """Unload and delete what can go now; `asking` is the number of turns in flight by version."""
        async with self._lock:
            for one in list(self._leaving):
                if not asking.get(one.version) and await self._unloaded(one.adapter):
                    await asyncio.sleep(max(0.0, self._cut_at.pop(one.version, 0.0) + LETS_GO_S - time.monotonic()))
                    await asyncio.to_thread(shutil.rmtree, Path(one.adapter.path), True)
                    self._leaving.remove(one)

    async def _unloaded(self, adapter: Adapter) -> bool:
        """True when no sampler has the name any more."""
        holders = self._holders.get(adapter.name, {})
        for sampler in list(holders.values()):
            async with self._database.begin() as session:
                await repository.unpin(session, adapter.name, self._holder)
                if await repository.pinned(session, sampler.id, adapter.name):
                    continue
                await repository.drop_adapter(session, sampler.id, adapter.name)
            try:
                await self._samplers.client(sampler).unload_adapter(adapter.name)
            except ModelNotServed:
                pass  # not there is what was wanted
            except SamplerError as error:
                # One that merely did not answer may still read the files; one whose row is gone was ended.
                live = await self._samplers.live(self._base_model, max_age_s=0.0)
                if sampler.id in {each.id for each in live}:
                    log.warning("unloading %s: %s", adapter.name, error)
                    continue
            del holders[sampler.id]
        if not holders:
            self._holders.pop(adapter.name, None)
        return not holders
