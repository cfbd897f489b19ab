"""The policy a run samples from: its versions, loaded into every live sampler, pinned, reloaded after a crash.

Does not cover: the proof that a version is served (`workers.sampler.proof`), and chat (`app.samplers.service.acquire`).

A version has one name and one directory, `<job>-a<attempt>-v<N>`, published once and never reloaded in place (design
§4.5). A sampler that comes back has a new id and has lost every adapter: the versions in use are loaded again, then the
turn is asked again whole.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from app.db.engine import Database
from app.samplers import repository
from app.samplers.client import Completion, CompletionRequest
from app.samplers.errors import ModelNotServed, SamplerError, SamplerGone, SamplerUnavailable
from app.samplers.service import Adapter, LiveSampler, NoSampler, Samplers, load
from workers.rollouts.trajectory import TurnRequest

log = logging.getLogger("hone.policy")

PIN_S = 90.0
KEEP_S = 20.0  # how often wants and pins are renewed
RETRY_PAUSE_S = 0.5
PUBLISH_WAIT_S = 300.0  # for the keeper to bring a sampler back: a finished step is worth more than this wait


class NoLiveSampler(SamplerUnavailable):
    """The keeper did not bring up a sampler in time; the message has its reason."""


class ServedPolicy:
    """One per run. Versions are added by `publish`, removed by `retire`; `turn` samples at one of them."""

    def __init__(self, samplers: Samplers, database: Database, base_model: str, holder: str) -> None:
        self._samplers = samplers
        self._database = database
        self._base_model = base_model
        self._holder = holder
        self._adapters: dict[int, Adapter] = {}
        self._ready: dict[str, LiveSampler] = {}  # samplers that hold every version in use
        self._recovering = asyncio.Lock()
        self._recoveries = 0
        self._turns = 0

    async def start(self, wait_s: float) -> LiveSampler:
        """Ask for a sampler and wait until one lives. Raises `NoLiveSampler`."""
        return await self._await_live(time.monotonic() + wait_s)

    async def keep(self) -> None:
        """Renew the want and the pins until cancelled."""
        while True:
            await asyncio.sleep(KEEP_S)
            await self._samplers.want(self._base_model)
            for sampler in list(self._ready.values()):
                try:
                    async with self._database.begin() as session:
                        for adapter in list(self._adapters.values()):
                            await repository.pin(session, sampler.id, adapter.name, self._holder, PIN_S)
                except SamplerGone:
                    self._ready.pop(sampler.id, None)

    async def publish(self, version: int, adapter: Adapter) -> None:
        """Load a version into every live sampler; without one, wait for it. Raises `SamplerError`.

        Samplers that went while nothing was sampled are forgotten here, or one of them would be asked for the proof.
        """
        self._adapters[version] = adapter
        before, self._ready = self._ready, {}
        for sampler in await self._samplers.live(self._base_model, max_age_s=0.0):
            missing = [adapter] if sampler.id in before else list(self._adapters.values())
            try:
                for one in missing:
                    await self._load(sampler, one)
                self._ready[sampler.id] = sampler
            except SamplerUnavailable as error:
                log.warning("publishing to %s: %s", sampler.url, error)
        if not self._ready:
            await self._recover(None, self._recoveries, time.monotonic() + PUBLISH_WAIT_S)

    async def retire(self, version: int) -> None:
        """Unload a version that no request names any more, and delete its directory once nobody pins it."""
        adapter = self._adapters.pop(version, None)
        if adapter is None:
            return
        free = True
        for sampler in list(self._ready.values()):
            async with self._database.begin() as session:
                await repository.unpin(session, adapter.name, self._holder)
                if await repository.pinned(session, sampler.id, adapter.name):
                    free = False
                    continue
                await repository.drop_adapter(session, sampler.id, adapter.name)
            try:
                await self._samplers.client(sampler).unload_adapter(adapter.name)
            except SamplerError as error:
                # A dead or restarted sampler holds nothing; one that merely did not answer may still read the files.
                log.warning("unloading %s: %s", adapter.name, error)
                free = free and isinstance(error, ModelNotServed)
        if free:
            await asyncio.to_thread(shutil.rmtree, Path(adapter.path), True)

    async def retire_all(self) -> None:
        """Retire every version; for the end of an attempt."""
        for version in list(self._adapters):
            await self.retire(version)

    async def turn(self, request: TurnRequest) -> Completion:
        """Sample one assistant message; retried whole on infrastructure faults until the request's deadline."""
        adapter = self._adapters[request.version]
        while True:
            seen, sampler = self._recoveries, self._pick()
            if sampler is None:
                await self._recover(None, seen, request.deadline)
                continue
            asked = CompletionRequest(
                model=adapter.name,
                prompt_ids=tuple(request.prompt_ids),
                max_tokens=request.max_tokens,
                temperature=request.temperature,
                stop_token_ids=tuple(request.stop_token_ids),
                stop=tuple(request.stop),
                request_id=request.request_id,
                timeout_s=max(1.0, request.deadline - time.monotonic()),
            )
            try:
                completion = await self._samplers.client(sampler).complete(asked)
                if completion.finish_reason != "abort":
                    return completion
                raise SamplerUnavailable("the engine aborted the request", url=sampler.url)
            except (SamplerUnavailable, ModelNotServed) as error:
                if time.monotonic() >= request.deadline:
                    raise
                log.warning("%s: %s; asking again", request.request_id, error)
                await self._recover(sampler, seen, request.deadline)

    async def score(self, name: str, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Teacher-forced log-probs under an adapter (or the base model's id), per sequence, from position 1 on."""
        sampler = self._pick()
        if sampler is None:
            raise NoLiveSampler("no live sampler", url=self._base_model)
        client = self._samplers.client(sampler)
        return [await client.score(name, ids) for ids in sequences]

    def path(self, version: int) -> str:
        """The directory of a version in use."""
        return self._adapters[version].path

    async def clear_leftovers(self, job_id: str, directory: Path) -> None:
        """Unload and delete what earlier attempts of this job left behind; nobody else uses their versions."""
        for sampler in await self._samplers.live(self._base_model, max_age_s=0.0):
            client = self._samplers.client(sampler)
            for served in await client.models():
                if served.id.startswith(f"{job_id}-a"):
                    await client.unload_adapter(served.id)
                    async with self._database.begin() as session:
                        await repository.drop_adapter(session, sampler.id, served.id)
        await asyncio.to_thread(shutil.rmtree, directory, True)

    @property
    def base_model(self) -> str:
        return self._base_model

    def _pick(self) -> LiveSampler | None:
        ready = sorted(self._ready.values(), key=lambda sampler: sampler.id)
        self._turns += 1
        return ready[self._turns % len(ready)] if ready else None

    async def _recover(self, failed: LiveSampler | None, seen: int, deadline: float) -> None:
        """After a failure on `failed`: wait for a live sampler and give it every version in use.

        One for all who failed since recovery number `seen`: hundreds of turns fail together when an engine goes.
        """
        async with self._recovering:
            if self._recoveries != seen and self._ready:
                return
            if failed is not None:
                self._ready.pop(failed.id, None)
                self._samplers.forget(failed)
                await asyncio.sleep(RETRY_PAUSE_S)
            while True:
                sampler = await self._await_live(deadline)
                try:
                    for adapter in list(self._adapters.values()):
                        await self._load(sampler, adapter)
                    self._ready[sampler.id] = sampler
                    self._recoveries += 1
                    return
                except SamplerError as error:
                    if time.monotonic() >= deadline:
                        raise
                    log.warning("loading versions into %s: %s", sampler.url, error)
                    await asyncio.sleep(RETRY_PAUSE_S)

    async def _load(self, sampler: LiveSampler, adapter: Adapter) -> None:
        try:
            await self._samplers.make_room(sampler, adapter.name)
        except NoSampler as error:
            raise SamplerUnavailable(error.reason, url=sampler.url) from error
        await load(self._samplers.client(sampler), adapter)
        async with self._database.begin() as session:
            await repository.add_adapter(session, sampler.id, adapter.name, adapter.path)
            await repository.pin(session, sampler.id, adapter.name, self._holder, PIN_S)

    async def _await_live(self, deadline: float) -> LiveSampler:
        while True:
            await self._samplers.want(self._base_model)
            for sampler in await self._samplers.live(self._base_model, max_age_s=0.0):
                if await self._samplers.client(sampler).health():
                    return sampler
            if time.monotonic() >= deadline:
                reason = await self._samplers.start_error(self._base_model)
                raise NoLiveSampler(f"no live sampler: {reason or 'the keeper started none'}", url=self._base_model)
            await asyncio.sleep(RETRY_PAUSE_S)
