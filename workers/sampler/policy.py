"""The policy a run samples from: its versions on every live sampler, pinned, and where each turn is asked.

Does not cover: the proof that a version is served (`workers.publication`, through `prover`), the leaving of versions
(`workers.sampler.parting`), chat (`app.samplers.service.acquire`).

A version has one name and one directory, `<job>-a<attempt>-v<N>`, published once and never reloaded in place (design
§4.5). A rollout stays at one sampler, where its prefix is cached. When that sampler fails, its turn is asked again at
another one that serves the version: whole, with the recorded ids as the prompt, so nothing is sampled twice into one
rollout. A sampler that comes, or comes back, gets every version in use and proves each before a turn is asked there.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from app.db.engine import Database
from app.samplers import repository
from app.samplers.client import Completion, CompletionRequest
from app.samplers.errors import (
    AdapterNotVisible,
    AdapterRefused,
    ModelNotServed,
    SamplerError,
    SamplerGone,
    SamplerUnavailable,
)
from app.samplers.metrics import LoadUnreadable, SamplerLoad, parse_load
from app.samplers.service import Adapter, LiveSampler, NoSampler, Samplers
from workers.rollouts.setting import TurnRequest
from workers.sampler.parting import Parting
from workers.sampler.proof import Unproved
from workers.sampler.station import Station

log = logging.getLogger("hone.policy")

PIN_S = 90.0
KEEP_S = 20.0  # how often wants and pins are renewed
RETRY_PAUSE_S = 0.5
ASKED_AT_MOST = 6  # times that a turn was sent to an engine that served and then failed
PUBLISH_WAIT_S = 300.0  # for the keeper to bring a sampler back: a finished step is worth more than this wait
CATCH_UP_S = 60.0  # well below PIN_S: the loop that renews the pins also brings samplers up to date


class NoLiveSampler(SamplerUnavailable):
    """The keeper did not bring up a sampler in time; the message has its reason."""


class NoRoom(SamplerUnavailable):
    """Every adapter slot is in use; a later pass may find one."""


class Prover(Protocol):
    """Called after a version was loaded at a station and before it is used there. Raises `Unproved`."""

    async def __call__(self, station: Station, version: int, adapter: Adapter) -> None: ...


async def nothing_to_prove(station: Station, version: int, adapter: Adapter) -> None:
    """The prover of a policy without a publisher: what was loaded is used."""


class ServedPolicy:
    """One per run. Versions are added by `publish`, removed by `retire`; `turn` samples at one of them."""

    def __init__(self, samplers: Samplers, database: Database, base_model: str, holder: str) -> None:
        self._samplers = samplers
        self._database = database
        self._base_model = base_model
        self._holder = holder
        self.prover: Prover = nothing_to_prove
        self._adapters: dict[int, Adapter] = {}
        self._stations: dict[str, Station] = {}  # by sampler id
        self._homes: dict[str, tuple[str, int]] = {}  # rollout → sampler id, version
        self._asking: Counter[int] = Counter()  # turns in flight or waiting, by version
        self._parting = Parting(samplers, database, base_model, holder)
        self._known: set[tuple[str, float, str]] = set()  # proved: sampler, its start, adapter name
        self._refused: dict[tuple[str, str], Unproved] = {}  # sampler, adapter name
        self._published = -1  # the newest version that is in use
        self._locks: dict[str, asyncio.Lock] = {}
        self._passing = asyncio.Lock()
        self._passed_at = -1e9
        self._wake = asyncio.Event()
        self._last_error: SamplerError | None = None

    # --- the life of the run's versions -----------------------------------------------------------------------------

    async def start(self, wait_s: float) -> LiveSampler:
        """Ask for a sampler and wait until one lives. Raises `NoLiveSampler`."""
        deadline = time.monotonic() + wait_s
        while True:
            await self._samplers.want(self._base_model)
            for sampler in await self._samplers.live(self._base_model, max_age_s=0.0):
                if await self._samplers.client(sampler).health():
                    return sampler
            if time.monotonic() >= deadline:
                raise await self._nobody()
            await asyncio.sleep(RETRY_PAUSE_S)

    async def keep(self) -> None:
        """Renew want and pins, bring samplers up to date, see retired versions off; until cancelled, or `Unproved`."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), KEEP_S)
            self._wake.clear()
            await self._samplers.want(self._base_model)
            for station in list(self._stations.values()):
                try:
                    async with self._database.begin() as session:
                        for adapter in list(self._adapters.values()):
                            await repository.pin(session, station.sampler.id, adapter.name, self._holder, PIN_S)
                except SamplerGone:
                    self._lose(station)
            await self._parting.see_off(self._asking)
            if self._adapters:
                await self._catch_up(time.monotonic() + CATCH_UP_S)
                self._require_provable()

    async def publish(self, version: int, adapter: Adapter) -> None:
        """Load a version into every live sampler and have it proved there; without a sampler, wait for one.

        Raises `Unproved` when no sampler proved it, and for the first version when any did not: a directory that one
        host cannot see is found before the first rollout. Raises `NoLiveSampler` after `PUBLISH_WAIT_S`.
        """
        self._adapters[version] = adapter
        deadline = time.monotonic() + PUBLISH_WAIT_S
        await self._pass()
        while True:
            refused = self.refusals(version)
            if refused and (self._published < 0 or not self._serving(version)):
                raise next(iter(refused.values()))
            if self._serving(version):
                break
            if time.monotonic() >= deadline:
                raise await self._nobody()
            await self._catch_up(deadline)
        self._published = version

    async def retire(self, version: int) -> None:
        """Unload a version and delete its directory once nobody pins it; `keep` does, if turns on it are in flight."""
        adapter = self._adapters.pop(version, None)
        if adapter is None:
            return
        for station in self._stations.values():
            station.proved.discard(version)
        for rollout in [rollout for rollout, (_, at) in self._homes.items() if at == version]:
            self._leave_home(rollout)
        self._known = {proof for proof in self._known if proof[2] != adapter.name}
        self._refused = {key: error for key, error in self._refused.items() if key[1] != adapter.name}
        self._parting.add(version, adapter)
        await self._parting.see_off(self._asking)

    async def retire_all(self) -> None:
        """Retire every version; for the end of an attempt."""
        for version in list(self._adapters):
            await self.retire(version)
        await self._parting.see_off(self._asking)

    async def clear_leftovers(self, job_id: str, directory: Path) -> None:
        """Unload and delete what earlier attempts of this job left behind; nobody else uses their versions."""
        for sampler in await self._samplers.live(self._base_model, max_age_s=0.0):
            client = self._samplers.client(sampler)
            for served in await client.models():
                if served.id.startswith(f"{job_id}-a"):
                    with suppress(ModelNotServed):  # the attempt before is just giving back what it holds
                        await client.unload_adapter(served.id)
                    async with self._database.begin() as session:
                        await repository.drop_adapter(session, sampler.id, served.id)
        await asyncio.to_thread(shutil.rmtree, directory, True)

    # --- what is asked of it ----------------------------------------------------------------------------------------

    async def turn(self, request: TurnRequest) -> Completion:
        """Sample one assistant message; asked again whole on infrastructure faults until the request's deadline.

        A turn that every engine dies of must not keep them all restarting until then: it is given up sooner.
        """
        adapter = self._adapters[request.version]
        failure: SamplerError | None = None
        with self._asks(request.version):
            for asked in itertools.count(1):
                station = await self._station(request, failure)
                try:
                    async with station.slot(request.deadline):
                        return await self._ask(station, adapter, request)
                except (SamplerUnavailable, ModelNotServed) as error:
                    if time.monotonic() >= request.deadline or asked == ASKED_AT_MOST:
                        raise
                    log.warning("%s: %s; asking again", request.request_id, error)
                    failure = error
                    self._lose(station)
        raise AssertionError  # count has no end

    async def score(self, name: str, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Teacher-forced log-probs under an adapter (or the base model's id), per sequence, from position 1 on."""
        if not self._stations:
            raise NoLiveSampler("no live sampler", url=self._base_model)
        client = min(self._stations.values(), key=lambda station: station.load).client
        return [await client.score(name, ids) for ids in sequences]

    async def loads(self) -> list[SamplerLoad]:
        """How busy each sampler in use is; one that does not say is left out."""

        async def one(station: Station) -> SamplerLoad | None:
            try:
                return parse_load(await station.client.metrics())
            except (SamplerError, LoadUnreadable) as error:
                log.info("no load: %s", error)
                return None

        found = await asyncio.gather(*(one(station) for station in list(self._stations.values())))
        return [load for load in found if load is not None]

    def versions(self) -> list[int]:
        """Published and not retired, oldest first."""
        return sorted(self._adapters)

    def stations(self, version: int) -> list[Station]:
        """Those that serve `version` with proof."""
        return self._serving(version)

    def refusals(self, version: int) -> dict[str, Unproved]:
        """Samplers (by id) that could not prove `version`, with what they showed."""
        adapter = self._adapters.get(version)
        return {sampler: error for (sampler, name), error in self._refused.items() if adapter and name == adapter.name}

    def path(self, version: int) -> str:
        """The directory of a version in use."""
        return self._adapters[version].path

    @property
    def base_model(self) -> str:
        return self._base_model

    # --- one turn ---------------------------------------------------------------------------------------------------

    async def _ask(self, station: Station, adapter: Adapter, request: TurnRequest) -> Completion:
        asked = CompletionRequest(
            model=adapter.name,
            prompt_ids=request.prompt_ids,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            stop_token_ids=tuple(request.stop_token_ids),
            stop=tuple(request.stop),
            request_id=request.request_id,
            timeout_s=max(1.0, request.deadline - time.monotonic()),
        )
        try:
            completion = await station.client.complete(asked)
        except BaseException:
            self._parting.cut(request.version)  # the engine may be at it for a moment yet
            raise
        if completion.finish_reason == "abort":
            raise SamplerUnavailable("the engine aborted the request", url=station.sampler.url)
        return replace(completion, sampler=station.sampler.id)

    async def _station(self, request: TurnRequest, failure: SamplerError | None) -> Station:
        while (station := self._pick(request)) is None:
            if time.monotonic() >= request.deadline:
                raise failure or await self._nobody()
            await self._catch_up(request.deadline)
        return station

    def _pick(self, request: TurnRequest) -> Station | None:
        """Where the rollout's last turn was, else the least loaded. A rollout's id is all before the last hyphen."""
        rollout = request.request_id.rpartition("-")[0]
        serving = self._serving(request.version)
        if not serving:
            return None
        home = self._homes.get(rollout)
        if home is not None and (station := self._stations.get(home[0])) in serving:
            return station
        self._leave_home(rollout)
        station = min(serving, key=lambda each: each.load)
        station.rollouts += 1
        self._homes[rollout] = station.sampler.id, request.version
        return station

    def _leave_home(self, rollout: str) -> None:
        home = self._homes.pop(rollout, None)
        if home is not None and (station := self._stations.get(home[0])) is not None:
            station.rollouts -= 1

    def _serving(self, version: int) -> list[Station]:
        return [station for station in self._stations.values() if version in station.proved]

    def _lose(self, station: Station) -> None:
        """Ask nothing of it until it was brought up to date again; hundreds of turns may report the same failure."""
        if self._stations.get(station.sampler.id) is station:
            del self._stations[station.sampler.id]
            self._samplers.forget(station.sampler)
            self._wake.set()

    @contextmanager
    def _asks(self, version: int) -> Iterator[None]:
        self._asking[version] += 1
        try:
            yield
        finally:
            self._asking[version] -= 1
            if not self._asking[version]:
                del self._asking[version]
                if version not in self._adapters:
                    self._wake.set()

    # --- bringing samplers up to date -------------------------------------------------------------------------------

    async def _catch_up(self, deadline: float) -> None:
        """After a pause, one pass over the live samplers: a single one for all who wait at the same time."""
        with suppress(TimeoutError):  # the callers look at their deadlines
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await asyncio.sleep(RETRY_PAUSE_S)
                async with self._passing:
                    if time.monotonic() - self._passed_at >= RETRY_PAUSE_S:
                        await self._pass()

    async def _pass(self) -> None:
        await self._samplers.want(self._base_model)
        live = await self._samplers.live(self._base_model, max_age_s=0.0)
        for station in [s for s in self._stations.values() if live and s.sampler.id not in {each.id for each in live}]:
            self._lose(station)
        await asyncio.gather(*(self._bring_up(sampler) for sampler in live))
        self._passed_at = time.monotonic()

    async def _bring_up(self, sampler: LiveSampler) -> None:
        """Load and prove what `sampler` does not serve yet; on failure it stays as it was, and a later pass tries."""
        async with self._locks.setdefault(sampler.id, asyncio.Lock()):
            station = self._stations.get(sampler.id)
            if station is None or station.sampler.started_at != sampler.started_at:
                station = Station(sampler, self._samplers.client(sampler))
                if not await station.client.health():
                    return
                station.rollouts = sum(home == sampler.id for home, _ in self._homes.values())
            for version, adapter in sorted(self._adapters.items()):
                key = (sampler.id, adapter.name)
                if version in station.proved or key in self._refused:
                    continue
                try:
                    await self._load_and_prove(station, version, adapter)
                except Unproved as error:
                    log.error("%s is not proved: %s", adapter.name, error)
                    self._refused[key] = error
                except (AdapterNotVisible, AdapterRefused) as error:
                    log.warning("%s, proved before, is not loaded yet: %s", adapter.name, error)
                    self._last_error = error
                except SamplerError as error:
                    log.warning("bringing a sampler up to date: %s", error)
                    self._last_error = error
                    if not isinstance(error, NoRoom):
                        self._lose(station)  # it may have lost the older versions too
                    return
            self._stations[sampler.id] = station

    async def _load_and_prove(self, station: Station, version: int, adapter: Adapter) -> None:
        sampler = station.sampler
        proof = (sampler.id, sampler.started_at, adapter.name)
        try:
            fresh = await self._load(sampler, adapter)
        except (AdapterNotVisible, AdapterRefused) as error:
            if version <= self._published:
                raise  # its files are right: a sampler that was just restarted may lack memory or a mount for a moment
            raise Unproved(str(error), sampler=sampler.url) from error
        if fresh or proof not in self._known:
            await self.prover(station, version, adapter)
        if self._adapters.get(version) == adapter:  # else it was retired meanwhile
            self._known.add(proof)
            station.proved.add(version)

    def _require_provable(self) -> None:
        """Raises `Unproved` when turns wait for a version that each sampler in use failed to prove again."""
        for version in self._asking:
            refused = self.refusals(version)
            if self._stations and not self._serving(version) and self._stations.keys() <= refused.keys():
                raise next(iter(refused.values()))

    async def _load(self, sampler: LiveSampler, adapter: Adapter) -> bool:
        try:
            await self._samplers.make_room(sampler, adapter.name)
        except NoSampler as error:
            raise NoRoom(error.reason, url=sampler.url) from error
        self._parting.holds(sampler, adapter)
        fresh = await self._samplers.load(sampler, adapter)
        async with self._database.begin() as session:
            await repository.add_adapter(session, sampler.id, adapter.name, adapter.path)
            await repository.pin(session, sampler.id, adapter.name, self._holder, PIN_S)
        return fresh

    async def _nobody(self) -> NoLiveSampler:
        reason = await self._samplers.start_error(self._base_model) or self._last_error
        return NoLiveSampler(f"no live sampler: {reason or 'the keeper started none'}", url=self._base_model)
