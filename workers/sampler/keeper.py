"""The keeper: runs the samplers of every wanted base model on this host, restarts them, and keeps their rows fresh.

Does not cover: which adapters a sampler holds: its users load and pin them (`app.samplers`, `workers.sampler.policy`).
Samplers that already run (HONE_SAMPLER_URLS) are registered here too, each in a row of its own, but neither started nor
stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time

from sqlalchemy import select

from app.core.ids import new_id
from app.core.settings import Settings
from app.db.engine import Database, now
from app.db.tables import DEFAULT_PROJECT, Sampler
from app.models.catalogue import BaseModel, Catalogue, ModelError
from app.net.clients import operator_client
from app.samplers import repository
from app.samplers.client import SamplerClient
from workers.daemon import Daemon, main
from workers.devices import NotEnoughGpus, gpus
from workers.presence import Presence
from workers.process import spawn_on_leash
from workers.sampler.admission import NotAdmitted, admit
from workers.sampler.engines import NoEngine, choose
from workers.sampler.kept import Failures, Kept, Place
from workers.sampler.last_words import last_words, size
from workers.sampler.launch import Engine

log = logging.getLogger("hone.keeper")

SILENCE_S = 30.0  # without any answer a sampler may only be busy; after this it is replaced
STOP_S = 3.0  # between SIGTERM and SIGKILL to a server's whole process group


class Keeper(Daemon):
    beat_s = 3.0

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.database = Database(settings.database)
        self.catalogue = Catalogue(settings.models_dir)
        self.http = operator_client(timeout_s=10.0)
        self.presence = Presence(self.database, "keeper", settings.hostname)
        self.urls = [part.strip() for part in settings.sampler_urls.split(",") if part.strip()]
        self.engine: Engine | None = None  # chosen when the first model is wanted
        self.kept: dict[Place, Kept] = {}
        self.failures = Failures()

    async def begin(self) -> None:
        await self.presence.announce()
        async with self.database.begin() as session:
            await repository.remove(session, host=self.settings.hostname)

    async def tick(self) -> None:
        async with self.database.read() as session:
            wanted = set(await repository.wants(session))
        moment = time.monotonic()
        for base_model in wanted:
            for place in await self.places(base_model):
                if place in self.kept:
                    self.kept[place].wanted = moment
                elif self.failures.may_start(place):
                    await self.start(place)
        waiting: list[Kept] = []
        for kept in list(self.kept.values()):
            if kept.child is not None and kept.child.poll() is not None:
                words = await asyncio.to_thread(last_words, kept.log, kept.log_from)
                await self.failed(kept, f"ended with exit code {kept.child.poll()}: {words}")
            elif kept.row_id is None:
                waiting.append(kept)
            elif kept.child is not None and moment - kept.wanted > self.settings.sampler_idle_s:
                log.info("stopping the sampler of %s: nobody wanted it", kept.base_model)
                await self.forget(kept)
        # Together: several that drop every packet must not keep those that serve from their next sign of life.
        await asyncio.gather(*(self.await_admission(kept) for kept in waiting))

    async def places(self, base_model: str) -> list[Place]:
        """Where this model is served: every given URL, or every server of the engine this host can run."""
        if self.urls:
            return [Place(base_model, url) for url in self.urls]
        if self.engine is None:
            try:
                self.engine = await self.choose_engine()
            except (NoEngine, NotEnoughGpus) as error:
                await self.note(base_model, str(error))
                return []
        return [Place(base_model, str(server)) for server in range(self.engine.servers)]

    async def choose_engine(self) -> Engine:
        """Raises `NoEngine`, `NotEnoughGpus`."""
        choice = choose(self.settings, await asyncio.to_thread(gpus))
        log.info("samplers run on the engine %s: %s", choice.engine.name, choice.why)
        if choice.slow is not None:
            log.warning("this host's GPUs do not sample: %s", choice.slow)
        return choice.engine

    async def start(self, place: Place) -> None:
        """Spawn a sampler, or take up one that runs elsewhere; its row appears once it is admitted."""
        try:
            model = self.catalogue.get(place.base_model)
        except ModelError as error:
            self.failures.rest(place, str(error))
            await self.note(place.base_model, str(error))
            return
        url, child, dtype, moment = place.where, None, self.explicit_dtype(), time.monotonic()
        facts: dict[str, object] = {}
        number = "" if place.where in ("0", *self.urls) else f"-{place.where}"
        log_file = self.settings.logs_dir / f"sampler-{place.base_model}{number}.log"
        log_from = size(log_file)
        if not self.urls:
            assert self.engine is not None  # `places` chose it
            port = _free_port()
            launch = self.engine.launch(model, int(place.where), port)
            try:
                child = await asyncio.to_thread(
                    spawn_on_leash, launch.command, log=log_file, environment=launch.environment
                )
            except OSError as error:  # its log cannot be written, say: the samplers of other models go on
                self.failures.add(place, f"it cannot be started: {error}")
                log.error("the sampler of %s: %s", model.id, self.failures.of(model.id))
                await self.note(model.id, self.failures.of(model.id))
                return
            url, dtype = f"http://127.0.0.1:{port}", launch.dtype
            facts = {"max_lora_rank": launch.max_lora_rank, "seeds": launch.seeds}
            log.info("starting %s for %s on port %d (process group %d)", self.engine.name, model.id, port, child.pid)
        self.kept[place] = Kept(
            place, url, child, dtype, facts, self.context(model), log_file, log_from, moment, moment
        )

    def explicit_dtype(self) -> str | None:
        return None if self.settings.sampler_dtype == "auto" else self.settings.sampler_dtype

    def context(self, model: BaseModel) -> int:
        return min(model.context, self.settings.sampler_max_model_len)

    async def await_admission(self, kept: Kept) -> None:
        """One look at a sampler that has no row yet. Its first request may take long: it runs beside the others."""
        if kept.admission is None:
            if await SamplerClient(self.http, kept.url).health():
                task = admit(self.http, kept.url, kept.base_model, dtype=kept.dtype, context=kept.context)
                kept.admission = asyncio.create_task(task)
            elif kept.child is None:
                await self.failed(kept, f"{kept.address} does not answer /health")
            elif time.monotonic() - kept.started > self.settings.sampler_start_s:
                words = await asyncio.to_thread(last_words, kept.log, kept.log_from)
                await self.failed(kept, f"not healthy after {self.settings.sampler_start_s:.0f} s: {words}")
            return
        if not kept.admission.done():
            return
        try:
            info = kept.admission.result().info
        except NotAdmitted as error:
            if error.another and kept.child is None:
                await self.skip(kept, str(error))
                return
            words = await asyncio.to_thread(last_words, kept.log, kept.log_from) if kept.child is not None else ""
            await self.failed(kept, f"{error}{': ' if words else ''}{words}")
            return
        await self.register(kept, info)

    async def register(self, kept: Kept, info: dict[str, object]) -> None:
        row_id = new_id("sampler-")
        async with self.database.begin() as session:
            stamp = await session.scalar(select(now())) or 0.0
            row = Sampler(
                id=row_id,
                project_id=DEFAULT_PROJECT,
                base_model=kept.base_model,
                url=kept.url,
                host=self.settings.hostname,
                adapter_root=str(self.settings.seen_root),
                max_loras=self.settings.sampler_max_adapters,
                info={"pid": kept.child.pid if kept.child else None, **kept.facts, **info},
                started_at=stamp,
                heartbeat=stamp,
            )
            await repository.register(session, row)
            await repository.set_want_error(session, kept.base_model, None)
        kept.row_id, kept.healthy = row_id, time.monotonic()
        self.failures.clear(kept.place)
        seconds, what = time.monotonic() - kept.started, (info["engine"], info.get("version"), info["dtype"])
        log.info("sampler for %s at %s is ready after %.1f s: %s %s, %s", kept.base_model, kept.address, seconds, *what)

    async def beat(self) -> None:
        """Refresh rows of samplers that answer; one that does not grows stale, then is replaced."""
        await self.presence.beat()
        rows = [kept for kept in self.kept.values() if kept.row_id is not None]
        await asyncio.gather(*(self.beat_one(kept) for kept in rows))

    async def beat_one(self, kept: Kept) -> None:
        client = SamplerClient(self.http, kept.url)
        if await client.health():
            kept.healthy = time.monotonic()
            async with self.database.begin() as session:
                await repository.beat(session, kept.row_id or "")
        elif await client.engine_is_dead():
            await self.failed(kept, f"its engine is dead: {await self.words(kept)}")
        elif time.monotonic() - kept.healthy > SILENCE_S:
            await self.failed(kept, f"did not answer /health for {SILENCE_S:.0f} s: {await self.words(kept)}")

    async def words(self, kept: Kept) -> str:
        """What its log says, or where it runs when the log is not ours."""
        return kept.address if kept.child is None else await asyncio.to_thread(last_words, kept.log, kept.log_from)

    async def failed(self, kept: Kept, reason: str) -> None:
        count = self.failures.add(kept.place, reason)
        log.error("the sampler of %s at %s failed (%d): %s", kept.base_model, kept.address, count, reason)
        await self.note(kept.base_model, self.failures.of(kept.base_model))
        await self.forget(kept)

    async def skip(self, kept: Kept, reason: str) -> None:
        """A URL that serves another model: no fault, unless none serves this one."""
        self.failures.rest(kept.place, reason)
        places = await self.places(kept.base_model)
        if all(place in self.failures.reasons for place in places):
            await self.note(kept.base_model, self.failures.of(kept.base_model))
        await self.forget(kept)

    async def note(self, base_model: str, reason: str) -> None:
        async with self.database.begin() as session:
            await repository.set_want_error(session, base_model, reason)

    async def forget(self, kept: Kept) -> None:
        if self.kept.pop(kept.place, None) is None:
            return
        if kept.admission is not None and not kept.admission.done():
            kept.admission.cancel()
            with contextlib.suppress(asyncio.CancelledError, NotAdmitted):
                await kept.admission
        try:
            if kept.row_id is not None:
                async with self.database.begin() as session:
                    await repository.remove(session, sampler_id=kept.row_id)
        finally:  # whatever the database says: nobody else knows of this process
            if kept.child is not None:
                await asyncio.to_thread(kept.child.stop, STOP_S)

    async def shut_down(self) -> None:
        await asyncio.gather(*(self.forget(kept) for kept in list(self.kept.values())))
        await self.presence.leave()
        await self.http.aclose()
        await self.database.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main("workers.sampler.keeper", Keeper)
