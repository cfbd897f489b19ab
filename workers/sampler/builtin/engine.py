"""The engine's thread: takes requests at any time, gives each weight version with work one step in turn.

Also keeps the table of adapter names. A request is bound to its version when it is submitted; unloading only removes
the name, the weights go when their last request has finished.
Does not cover: HTTP (`server`), batching inside a version (`lane`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch

from workers.sampler.builtin.adapters import merge_adapter
from workers.sampler.builtin.generation import (
    AdapterRefused,
    EngineFault,
    Generation,
    Outcome,
    RequestRefused,
)
from workers.sampler.builtin.kv import PoolShelf
from workers.sampler.builtin.lane import Lane
from workers.sampler.builtin.model import LoadedModel, ServedWeights
from workers.sampler.builtin.running import Running
from workers.sampler.builtin.text import Decoder, StopStrings

log = logging.getLogger(__name__)
Finish = Callable[[Outcome | EngineFault], None]


@dataclass(frozen=True)
class Limits:
    max_adapters: int
    max_rank: int
    max_rows: int = 256  # sequences of one version that run at once
    max_waiting: int = 4096
    cache_tokens: int = 65536  # finished text kept for reuse, all versions together
    running_tokens: int = 65536  # what the running sequences of one version may come to hold


@dataclass(eq=False)
class Version:
    name: str
    root: str
    weights: ServedWeights
    lane: Lane
    users: int = 0
    last_turn: int = 0


@dataclass(frozen=True, eq=False)
class Ticket:
    version: Version
    row: Running


@dataclass
class Counters:
    generated: int = 0
    prompt: int = 0
    cached: int = 0
    steps: int = 0


@dataclass(frozen=True)
class _Load:
    name: str
    path: Path
    done: Future[None]


@dataclass
class _Inbox:
    submitted: list[Ticket] = field(default_factory=list)
    cancelled: list[Ticket] = field(default_factory=list)
    loads: list[_Load] = field(default_factory=list)
    unloaded: bool = False

    def __bool__(self) -> bool:
        return bool(self.submitted or self.cancelled or self.loads or self.unloaded)


class Engine:
    def __init__(self, model: LoadedModel, decoder: Decoder, base_name: str, limits: Limits) -> None:
        self.model, self.base_name, self.limits = model, base_name, limits
        self.counters = Counters()
        self._decoder = decoder
        self._shelf = PoolShelf(model.shape)
        self._wake = threading.Condition()
        self._inbox = _Inbox()
        self._dead: str | None = None
        self._stopping = False
        self._turn = 0
        base = self._version(base_name, str(model.path), model.base)
        self._names: dict[str, Version] = {base_name: base}
        self._unloaded: list[Version] = []  # nameless, with requests still running

    # --- from any thread ---

    def stop(self) -> None:
        """Make `run` return after its current step; may be called from a signal handler."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    @property
    def healthy(self) -> bool:
        return self._dead is None

    def adapters(self) -> list[Version]:
        with self._wake:
            return [v for v in self._names.values() if v.name != self.base_name]

    def resolve(self, name: str) -> Version:
        with self._wake:
            version = self._names.get(name)
        if version is None:
            raise RequestRefused(404, f"The model `{name}` does not exist.", type="NotFoundError", param="model")
        return version

    def submit(self, version: Version, generation: Generation, finish: Finish) -> Ticket:
        """Queue one sequence; `finish` is called once from the engine's thread, unless the ticket is cancelled."""
        stops = StopStrings(self._decoder, generation.stop) if generation.stop else None
        row = Running(generation, finish, stops)
        ticket = Ticket(version, row)
        with self._wake:
            if self._dead is not None:
                raise EngineFault(self._dead)
            if self.waiting >= self.limits.max_waiting:
                raise RequestRefused(503, "the queue is full", type="ServiceUnavailableError")
            version.users += 1
            self._inbox.submitted.append(ticket)
            self._wake.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Stop computing; does nothing to a ticket that has finished."""
        with self._wake:
            self._inbox.cancelled.append(ticket)
            self._wake.notify()

    @property
    def running(self) -> int:
        return sum(len(v.lane.rows) for v in self._versions())

    @property
    def waiting(self) -> int:
        return len(self._inbox.submitted) + sum(len(v.lane.waiting) for v in self._versions())

    @property
    def kv_usage(self) -> float:
        """Share of its KV room that the fullest version's running sequences have filled; reusable cache is free room.

        Filled, not reserved: as vLLM counts, whose blocks are taken when they are written.
        """
        return max(v.lane.held for v in self._versions()) / max(self.limits.running_tokens, 1)

    def load_adapter(self, name: str, path: Path, *, timeout_s: float) -> None:
        """Merge and name a new version between two steps of the engine's thread, and wait for it.

        Raises RequestRefused or AdapterRefused, and EngineFault when the engine is dead or does not come to it in time.
        """
        done: Future[None] = Future()
        with self._wake:
            if self._dead is not None:
                raise EngineFault(self._dead)
            self._inbox.loads.append(_Load(name, path, done))
            self._wake.notify()
        try:
            done.result(timeout_s)
        except TimeoutError as error:
            done.cancel()
            raise EngineFault(f"adapter '{name}' was not loaded within {timeout_s:.0f} s") from error

    def unload_adapter(self, name: str) -> None:
        with self._wake:
            version = self._names.get(name)
            if version is None or name == self.base_name:
                raise RequestRefused(
                    404, f"The lora adapter '{name}' cannot be found.", type="NotFoundError", param="lora_name"
                )
            del self._names[name]
            self._unloaded.append(version)
            self._inbox.unloaded = True
            self._wake.notify()

    # --- inside ---

    def _version(self, name: str, root: str, weights: ServedWeights) -> Version:
        m = self.model
        with torch.inference_mode():
            lane = Lane(
                weights.module,
                self._shelf,
                m.groups,
                m.eos,
                max_rows=self.limits.max_rows,
                max_tokens=self.limits.running_tokens,
            )
        return Version(name, root, weights, lane)

    def _versions(self) -> list[Version]:
        return [*list(self._names.values()), *list(self._unloaded)]

    def _sweep(self) -> None:
        """Only in the engine's thread: nobody else touches a tree."""
        for v in self._unloaded:
            if not v.users:
                v.lane.tree.clear()
        self._unloaded = [v for v in self._unloaded if v.users]

    def _require_memory(self) -> None:
        need = sum(w.numel() for w in self.model.pristine.values()) * self.model.dtype.itemsize
        free = _available_bytes()
        if free is not None and free < need * 1.1:
            raise AdapterRefused(f"a merged copy needs {need >> 20} MiB, {free >> 20} MiB are free: unload a version")

    def run(self) -> None:
        """Compute until `stop`, or until the engine fails.

        Call it in the thread that loaded the model: every thread that runs a parallel region gets OpenMP workers of its
        own, and with more workers than cores libgomp puts them to sleep between regions (half the speed on two cores).
        """
        with torch.inference_mode():
            while True:
                with self._wake:
                    while not (self._stopping or self._inbox or self._next()):
                        self._wake.wait()
                    if self._stopping:
                        return
                    loads = self._take_in()
                    self._sweep()
                    version = self._next()
                for load in loads:
                    self._load(load)
                if version is None:
                    continue
                try:
                    self._step(version)
                except Exception as error:  # the boundary of the thread: report, answer everyone, say 503 from now on
                    log.exception("the engine failed")
                    self._die(f"the engine failed: {error}")
                    return

    def _take_in(self) -> list[_Load]:
        """What came in since. A function of its own: its variables must not keep a version while `run` sleeps."""
        inbox, self._inbox = self._inbox, _Inbox()
        for t in inbox.submitted:
            t.version.lane.waiting.append(t.row)
        for t in inbox.cancelled:
            if t.version.lane.cancel(t.row):
                t.version.users -= 1
        return inbox.loads

    def _load(self, load: _Load) -> None:
        if not load.done.set_running_or_notify_cancel():
            return
        try:
            self._merge(load.name, load.path)
        except (RequestRefused, AdapterRefused) as refusal:
            load.done.set_exception(refusal)
        except Exception as error:  # a file or memory fault of one adapter must not end the engine
            log.exception("adapter %s at %s", load.name, load.path)
            load.done.set_exception(AdapterRefused(str(error)))
        else:
            load.done.set_result(None)

    def _merge(self, name: str, path: Path) -> None:
        with self._wake:
            if not name or name in self._names:
                raise RequestRefused(
                    400,
                    f"The lora adapter '{name}' has already been loaded, or is no name.",
                    type="InvalidUserInput",
                    param="lora_name",
                )
            live = len(self._names) - 1 + len(self._unloaded)
        if live >= self.limits.max_adapters:
            raise RequestRefused(
                400,
                f"{live} adapter versions are live, --max-loras is {self.limits.max_adapters}: unload one",
                param="lora_name",
            )
        if not (path / "adapter_config.json").is_file() or not (path / "adapter_model.safetensors").is_file():
            raise RequestRefused(404, f"No adapter found for {path}", type="NotFoundError", param="lora_path")
        self._require_memory()
        merged = merge_adapter(path, self.model.pristine, max_rank=self.limits.max_rank)
        version = self._version(name, str(path), self.model.with_weights(merged))
        with self._wake:
            self._names[name] = version

    def _next(self) -> Version | None:
        """The version with work whose last turn is longest ago."""
        return min((v for v in self._versions() if v.lane.busy), key=lambda v: v.last_turn, default=None)

    def _step(self, version: Version) -> None:
        self._turn += 1
        version.last_turn = self._turn
        report = version.lane.step()
        with self._wake:
            version.users -= len(report.ended)
        c = self.counters
        c.steps += 1
        c.generated += report.sampled
        c.prompt += report.prompt
        c.cached += report.cached
        for row, result in report.ended:
            row.finish(result)
        self._trim_caches()

    def _trim_caches(self) -> None:
        """Keep the cache within its size, at the cost of the versions that ran longest ago."""
        versions = sorted(self._versions(), key=lambda v: v.last_turn)
        surplus = sum(v.lane.tree.tokens for v in versions) - self.limits.cache_tokens
        for v in versions:
            if surplus <= 0:
                return
            surplus -= v.lane.tree.evict(surplus)

    def _die(self, reason: str) -> None:
        with self._wake:
            self._dead = reason
            inbox, self._inbox = self._inbox, _Inbox()
        for t in inbox.submitted:
            t.row.finish(EngineFault(reason))
        for load in inbox.loads:
            if load.done.set_running_or_notify_cancel():
                load.done.set_exception(EngineFault(reason))
        for v in self._versions():
            v.lane.fail(EngineFault(reason))


def _available_bytes() -> int | None:
    """Free memory of this machine, or None where there is no /proc/meminfo."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
