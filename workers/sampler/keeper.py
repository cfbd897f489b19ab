"""The keeper: runs one sampler per wanted base model on this host, restarts it, and keeps its row fresh.

Does not cover: which adapters a sampler holds: its users load and pin them (`app.samplers`, `workers.sampler.policy`).
A sampler that already runs elsewhere (HONE_SAMPLER_URLS) is registered here too, but neither started nor stopped.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select

from app.core.ids import new_id
from app.core.settings import Settings
from app.db.engine import Database, now
from app.db.tables import DEFAULT_PROJECT, Sampler
from app.models.catalogue import BaseModel, Catalogue, UnknownModel
from app.net.clients import operator_client
from app.samplers import repository
from app.samplers.client import SamplerClient
from app.samplers.errors import SamplerError
from workers.daemon import Daemon, main
from workers.presence import Presence
from workers.process import Child, log_tail, spawn_on_leash

log = logging.getLogger("hone.keeper")

SILENCE_S = 30.0  # without any answer a sampler may only be busy; after this it is replaced
BACK_OFF_S = (0.0, 1.0, 3.0, 10.0, 30.0)


@dataclass
class Kept:
    """A sampler this keeper answers for."""

    base_model: str
    url: str
    child: Child | None  # None: it runs elsewhere
    log: Path
    started: float  # monotonic
    wanted: float  # monotonic: last time somebody wanted it
    row_id: str | None = None  # set once it is healthy
    healthy: float = 0.0  # monotonic: last time it answered /health


class Keeper(Daemon):
    beat_s = 3.0

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.database = Database(settings.database)
        self.catalogue = Catalogue(settings.models_dir)
        self.http = operator_client(timeout_s=10.0)
        self.presence = Presence(self.database, "keeper", settings.hostname)
        self.kept: dict[str, Kept] = {}
        self.failures: dict[str, int] = {}
        self.retry_at: dict[str, float] = {}

    async def begin(self) -> None:
        await self.presence.announce()
        async with self.database.begin() as session:
            await repository.remove(session, host=self.settings.hostname)

    async def tick(self) -> None:
        async with self.database.read() as session:
            wanted = set(await repository.wants(session))
        moment = time.monotonic()
        for base_model in wanted:
            if base_model in self.kept:
                self.kept[base_model].wanted = moment
            elif moment >= self.retry_at.get(base_model, 0.0):
                await self.start(base_model)
        for kept in list(self.kept.values()):
            if kept.child is not None and kept.child.poll() is not None:
                await self.failed(kept, f"ended with exit code {kept.child.poll()}: {log_tail(kept.log, 500)}")
            elif kept.row_id is None:
                await self.await_health(kept)
            elif kept.child is not None and moment - kept.wanted > self.settings.sampler_idle_s:
                log.info("stopping the sampler of %s: nobody wanted it", kept.base_model)
                await self.forget(kept)

    async def start(self, base_model: str) -> None:
        """Spawn a sampler for `base_model`; its row appears when it answers /health."""
        moment = time.monotonic()
        try:
            model = self.catalogue.get(base_model)
        except UnknownModel as error:
            await self.note(base_model, str(error))
            self.retry_at[base_model] = moment + BACK_OFF_S[-1]
            return
        log_file = self.settings.logs_dir / f"sampler-{base_model}.log"
        if urls := [part.strip() for part in self.settings.sampler_urls.split(",") if part.strip()]:
            url = urls[self.failures.get(base_model, 0) % len(urls)]  # one that does not serve it: try the next
            self.kept[base_model] = Kept(base_model, url, None, log_file, moment, moment)
            return
        port = _free_port()
        child = await asyncio.to_thread(
            spawn_on_leash,
            self.command(model, port),
            log=log_file,
            environment={"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
        )
        log.info("starting a sampler for %s on port %d (process group %d)", base_model, port, child.pid)
        self.kept[base_model] = Kept(base_model, f"http://127.0.0.1:{port}", child, log_file, moment, moment)

    def command(self, model: BaseModel, port: int) -> list[str]:
        """The built-in engine; a vLLM launcher gives another list and nothing else changes."""
        settings = self.settings
        options = {
            "--model": model.path,
            "--served-model-name": model.id,
            "--host": "127.0.0.1",
            "--port": port,
            "--dtype": settings.sampler_dtype,
            "--max-model-len": min(model.context, settings.sampler_max_model_len),
            "--max-loras": settings.sampler_max_adapters,
            "--threads": settings.cpu_threads,
        }
        flat = [str(part) for pair in options.items() for part in pair]
        return [sys.executable, "-m", "workers.sampler.builtin", *flat]

    async def await_health(self, kept: Kept) -> None:
        client = SamplerClient(self.http, kept.url)
        if not await client.health():
            if time.monotonic() - kept.started > self.settings.sampler_start_s:
                await self.failed(kept, f"not healthy after {self.settings.sampler_start_s:.0f} s")
            return
        try:
            served = await client.models()
        except SamplerError as error:
            log.warning("sampler at %s: %s", kept.url, error)
            return
        if kept.base_model not in {model.id for model in served}:
            await self.failed(kept, f"{kept.url} serves {[model.id for model in served]}")
            return
        row_id = new_id("sampler-")
        async with self.database.begin() as session:
            stamp = await session.scalar(select(now())) or 0.0
            row = Sampler(
                id=row_id,
                project_id=DEFAULT_PROJECT,
                base_model=kept.base_model,
                url=kept.url,
                host=self.settings.hostname,
                adapter_root=str(self.settings.root),
                max_loras=self.settings.sampler_max_adapters,
                info={"pid": kept.child.pid if kept.child else None, **(await client.version())},
                started_at=stamp,
                heartbeat=stamp,
            )
            await repository.register(session, row)
            await repository.set_want_error(session, kept.base_model, None)
        kept.row_id, kept.healthy = row_id, time.monotonic()
        self.failures.pop(kept.base_model, None)
        log.info("sampler for %s is ready after %.1f s", kept.base_model, time.monotonic() - kept.started)

    async def beat(self) -> None:
        """Refresh rows of samplers that answer; one that does not grows stale, then is replaced."""
        await self.presence.beat()
        for kept in list(self.kept.values()):
            if kept.row_id is None:
                continue
            client = SamplerClient(self.http, kept.url)
            if await client.health():
                kept.healthy = time.monotonic()
                async with self.database.begin() as session:
                    await repository.beat(session, kept.row_id)
            elif kept.child is not None and await client.engine_is_dead():
                await self.failed(kept, f"its engine is dead: {log_tail(kept.log, 500)}")
            elif kept.child is not None and time.monotonic() - kept.healthy > SILENCE_S:
                await self.failed(kept, f"did not answer /health for {SILENCE_S:.0f} s: {log_tail(kept.log, 500)}")

    async def failed(self, kept: Kept, reason: str) -> None:
        count = self.failures.get(kept.base_model, 0) + 1
        self.failures[kept.base_model] = count
        self.retry_at[kept.base_model] = time.monotonic() + BACK_OFF_S[min(count, len(BACK_OFF_S)) - 1]
        log.error("the sampler of %s failed (%d): %s", kept.base_model, count, reason)
        await self.note(kept.base_model, reason)
        await self.forget(kept)

    async def note(self, base_model: str, reason: str) -> None:
        async with self.database.begin() as session:
            await repository.set_want_error(session, base_model, reason)

    async def forget(self, kept: Kept) -> None:
        del self.kept[kept.base_model]
        if kept.row_id is not None:
            async with self.database.begin() as session:
                await repository.remove(session, sampler_id=kept.row_id)
        if kept.child is not None:
            await asyncio.to_thread(kept.child.stop, 3.0)

    async def shut_down(self) -> None:
        for kept in list(self.kept.values()):
            await self.forget(kept)
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
