"""Find a live sampler, make sure it has the adapter, and hold the adapter while it is used (design §6.1–2).

Does not cover: a run's own versions (`workers.sampler.policy`), nor starting samplers (`workers.sampler.keeper`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.settings import Settings
from app.db.engine import Database
from app.net.clients import operator_client
from app.samplers import repository
from app.samplers.client import SamplerClient
from app.samplers.errors import (
    AdapterNotVisible,
    ModelNotServed,
    SamplerGone,
    SamplerRejected,
    SamplerUnavailable,
)

log = logging.getLogger(__name__)

PIN_S = 45.0  # a chat pin outlives its process by at most this; while a request runs it is renewed
RENEW_BELOW_S = 20.0
LOAD_TIMEOUT_S = 60.0


Pin = tuple[str, str, str]  # sampler, adapter, holder


@dataclass(frozen=True)
class Adapter:
    """One published adapter directory under the name it is served by; neither is ever reused."""

    name: str
    path: str


@dataclass(frozen=True)
class LiveSampler:
    id: str
    url: str
    base_model: str
    max_loras: int
    started_at: float
    info: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)
    adapter_root: str = ""  # our data directory as this sampler sees it; empty: under the same path


@dataclass(frozen=True)
class Lease:
    """Send requests for `model` to `client`; the adapter stays loaded until the context ends."""

    client: SamplerClient
    model: str
    sampler: LiveSampler


class NoSampler(Exception):
    """No live sampler can serve this now; the keeper was asked. `reason` is for people."""

    def __init__(self, reason: str, retry_after_s: float = 5.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s


class Samplers:
    """One per process. Keeps short caches so that a chat request costs no database write."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._root = settings.root
        self._http = operator_client(timeout_s=600.0)
        self._clients: dict[str, SamplerClient] = {}
        self._live: dict[str, tuple[float, list[LiveSampler]]] = {}
        self._wanted: dict[str, float] = {}
        self._pins: dict[Pin, float] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._in_use: Counter[Pin] = Counter()
        self._renewing: dict[Pin, asyncio.Task[None]] = {}
        self._turn = 0

    async def close(self) -> None:
        await self._http.aclose()

    def client(self, sampler: LiveSampler) -> SamplerClient:
        return self._clients.setdefault(sampler.url, SamplerClient(self._http, sampler.url))

    async def want(self, base_model: str, seconds: float = 180.0) -> None:
        """Ask the keeper for a sampler; written at most every 20 s per model."""
        if time.monotonic() - self._wanted.get(base_model, -1e9) < 20.0:
            return
        self._wanted[base_model] = time.monotonic()  # before the write: a burst of callers makes one
        try:
            async with self._database.begin() as session:
                await repository.want(session, base_model, seconds)
        except BaseException:
            del self._wanted[base_model]
            raise

    async def live(self, base_model: str, *, max_age_s: float = 1.0) -> list[LiveSampler]:
        """Live samplers of `base_model`; the answer may be `max_age_s` old."""
        async with self._locks.setdefault(base_model, asyncio.Lock()):  # one query for all who wait
            at, found = self._live.get(base_model, (-1e9, []))
            if found and time.monotonic() - at < max_age_s:
                return found
            async with self._database.read() as session:
                rows = await repository.live(session, base_model)
            found = [
                LiveSampler(r.id, r.url, r.base_model, r.max_loras, r.started_at, r.info, r.adapter_root) for r in rows
            ]
            self._live[base_model] = (time.monotonic(), found)
            return found

    async def start_error(self, base_model: str) -> str | None:
        async with self._database.read() as session:
            return await repository.want_error(session, base_model)

    @asynccontextmanager
    async def acquire(
        self,
        base_model: str,
        adapter: Adapter | None,
        holder: str,
        *,
        wait_s: float = 0.0,
        avoid: frozenset[str] = frozenset(),
    ) -> AsyncIterator[Lease]:
        """A sampler that serves `adapter` (None: the base model). Raises `NoSampler` after `wait_s`.

        The adapter is loaded on demand and stays pinned to the end of the context; the least recently used one that
        nobody is using makes room. `avoid`: ids of samplers that just failed; one of them is taken only when there is
        no other.
        """
        await self.want(base_model)
        deadline = time.monotonic() + wait_s
        while True:
            try:
                lease = await self._try(base_model, adapter, holder, avoid)
                break
            except NoSampler:
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(0.25)
        if adapter is None:
            yield lease
            return
        pin = (lease.sampler.id, adapter.name, holder)
        self._in_use[pin] += 1  # no await since the pin was seen: nobody could let it go in between
        if pin not in self._renewing:
            self._renewing[pin] = asyncio.create_task(self._renew(pin))
        try:
            yield lease
        finally:
            self._in_use[pin] -= 1
            if not self._in_use[pin]:
                del self._in_use[pin]
                self._renewing.pop(pin).cancel()

    async def _renew(self, pin: Pin) -> None:
        """Hold a pin while it is in use: a long answer outlives `PIN_S`."""
        while True:
            await asyncio.sleep(PIN_S / 3)
            try:
                async with self._database.begin() as session:
                    await repository.pin(session, *pin, PIN_S)
            except SamplerGone:
                return
            except SQLAlchemyError as error:
                log.warning("could not renew the pin of %s: %s", pin[1], error)
            else:
                self._pins[pin] = time.monotonic() + PIN_S

    async def _let_go(self, session: AsyncSession, sampler: LiveSampler) -> None:
        """Give up our pins that no request is using: they spare a query, and are not worth a slot that is wanted."""
        for pin in [pin for pin in self._pins if pin[0] == sampler.id and pin not in self._in_use]:
            del self._pins[pin]  # first: from here on a request has to ask, and waits for its turn
            await repository.unpin(session, pin[1], pin[2], sampler_id=sampler.id)

    async def _try(self, base_model: str, adapter: Adapter | None, holder: str, avoid: frozenset[str]) -> Lease:
        samplers = await self.live(base_model)
        if not samplers:
            error = await self.start_error(base_model)
            raise NoSampler(
                f"no sampler for {base_model} is running" + (f": {error}" if error else "; one is starting")
            )
        fresh = [s for s in samplers if s.id not in avoid] or samplers
        if adapter is None:
            self._turn += 1
            sampler = fresh[self._turn % len(fresh)]
            return Lease(self.client(sampler), base_model, sampler)
        for sampler in fresh:
            if self._is_pinned(sampler, adapter, holder):  # costs no query
                return Lease(self.client(sampler), adapter.name, sampler)
        failure: NoSampler | SamplerUnavailable | AdapterNotVisible | None = None
        for sampler in await self._by_room(fresh, adapter) if len(fresh) > 1 else fresh:
            try:
                return await self._lease(sampler, adapter, holder)
            except (NoSampler, SamplerUnavailable) as error:  # full, gone or dead: the next may do
                failure = error
            except AdapterNotVisible as error:  # this one mounts another directory; what may pass is told first
                log.error("%s", error)
                failure = failure or error
        assert failure is not None
        raise failure

    async def _by_room(self, samplers: list[LiveSampler], adapter: Adapter) -> list[LiveSampler]:
        """Those that hold the adapter, then those with an empty slot, then those where another must go."""
        ranks: dict[str, int] = {}
        async with self._database.read() as session:
            for sampler in samplers:
                if await repository.loaded(session, sampler.id, adapter.name) is not None:
                    ranks[sampler.id] = 0
                    continue
                reserved = await repository.reserved_but_unused(session, sampler.id, sampler.base_model)
                taken = await repository.adapter_count(session, sampler.id) + reserved
                ranks[sampler.id] = 1 if taken < sampler.max_loras else 2
        return sorted(samplers, key=lambda sampler: ranks[sampler.id])

    async def _lease(self, sampler: LiveSampler, adapter: Adapter, holder: str) -> Lease:
        async with self._locks.setdefault(sampler.id, asyncio.Lock()):
            if not self._is_pinned(sampler, adapter, holder):
                try:
                    await self._load_and_pin(sampler, adapter, holder)
                except SamplerGone as error:  # since the answer of `live`
                    self.forget(sampler)
                    raise NoSampler(str(error)) from error
                self._pins[(sampler.id, adapter.name, holder)] = time.monotonic() + PIN_S
        return Lease(self.client(sampler), adapter.name, sampler)

    def _is_pinned(self, sampler: LiveSampler, adapter: Adapter, holder: str) -> bool:
        until = self._pins.get((sampler.id, adapter.name, holder), 0.0)
        return until - time.monotonic() >= RENEW_BELOW_S

    async def _load_and_pin(self, sampler: LiveSampler, adapter: Adapter, holder: str) -> None:
        async with self._database.begin() as session:
            await repository.own(session, sampler.id)
            row = await repository.loaded(session, sampler.id, adapter.name)
            if row is not None:
                await repository.pin(session, sampler.id, adapter.name, holder, PIN_S)
                return
            reserved = await repository.reserved_but_unused(session, sampler.id, sampler.base_model)
        await self.make_room(sampler, adapter.name, keep_free=reserved)
        await self.load(sampler, adapter)
        async with self._database.begin() as session:
            await repository.add_adapter(session, sampler.id, adapter.name, adapter.path)
            await repository.pin(session, sampler.id, adapter.name, holder, PIN_S)

    async def make_room(self, sampler: LiveSampler, name: str, *, keep_free: int = 0) -> None:
        """Let `name` fit beside `keep_free` empty slots: idle adapters go, least recently used first.

        Raises `NoSampler` when those that are in use leave no room, `SamplerGone`.
        """
        async with self._database.begin() as session:
            await repository.own(session, sampler.id)
            if await repository.loaded(session, sampler.id, name) is not None:
                return
            room = sampler.max_loras - await repository.adapter_count(session, sampler.id) - keep_free
            if room <= 0:
                await self._let_go(session, sampler)
            victims = [] if room > 0 else list(await repository.evictable(session, sampler.id))[: 1 - room]
            if room + len(victims) <= 0:
                raise NoSampler(f"every adapter slot of the sampler for {sampler.base_model} is in use", 10.0)
            for victim in victims:
                await repository.drop_adapter(session, sampler.id, victim.name)
        for victim in victims:
            with contextlib.suppress(ModelNotServed):  # not there is what was wanted
                await self.client(sampler).unload_adapter(victim.name)

    async def load(self, sampler: LiveSampler, adapter: Adapter) -> bool:
        """Load `adapter` under its name, by the path the sampler sees; False when it was there already.

        There under the same name *and* path is success, since neither is ever reused. Raises `AdapterNotVisible` and
        the errors of the client.
        """
        client, path = self.client(sampler), seen_path(adapter.path, self._root, sampler.adapter_root)
        try:
            await client.load_adapter(adapter.name, path)
        except SamplerRejected:
            served = {model.id: model.root for model in await client.models()}
            if served.get(adapter.name) != path:
                raise
            return False
        except ModelNotServed as error:
            raise AdapterNotVisible(adapter.path, path, url=sampler.url) from error
        return True

    async def lost_adapter(self, sampler: LiveSampler, name: str) -> None:
        """The sampler says it does not serve `name`, whatever its rows say: load it again next time."""
        self.forget(sampler)
        async with self._database.begin() as session:
            await repository.drop_adapter(session, sampler.id, name)

    def forget(self, sampler: LiveSampler) -> None:
        """After a failure: ask the database again before the next request, and pin anew."""
        self._live.pop(sampler.base_model, None)
        for key in [key for key in self._pins if key[0] == sampler.id]:
            del self._pins[key]


def seen_path(path: str, ours: Path, theirs: str) -> str:
    """`path` as a sampler sees it that has our data directory `ours` at `theirs`; elsewhere paths are the same."""
    if not theirs or Path(theirs) == ours or not Path(path).is_relative_to(ours):
        return path
    return str(Path(theirs) / Path(path).relative_to(ours))


__all__ = ["Adapter", "Lease", "LiveSampler", "NoSampler", "Samplers", "seen_path"]
