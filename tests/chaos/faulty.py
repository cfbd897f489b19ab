"""Faults and mutations inside a process of the service: installed by the storm's own programs, never by the product.

Does not cover: when a fault comes (`faults` orders it), nor faults from outside (signals, the database, the broker).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import sys
import threading
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import update

from app.checkpoints import store
from app.core.settings import Settings
from app.db import engine as databases
from app.db.tables import Job
from app.jobs import leases
from app.rollouts import traces
from tests.chaos.audit import Identity
from tests.chaos.orders import Orders

MUTATIONS = ("fence", "directory", "late_ack")
TINY_TRAINER = (sys.executable, "-m", "tests.chaos.trainer")
CLOCK_LOOK_S = 0.5


def spare_openai() -> None:
    """`renderers` imports the client library for a class that we never use: half a second of each start."""
    sys.modules.setdefault("openai", types.SimpleNamespace(AsyncOpenAI=object))  # type: ignore[arg-type]


def jumping_clock(orders: Orders) -> None:
    """The wall clock of this process goes off by an hour when that is ordered; monotonic clocks never do."""
    real, real_ns, ahead = time.time, time.time_ns, [0]
    time.time = lambda: real() + ahead[0]
    time.time_ns = lambda: real_ns() + ahead[0] * 10**9

    def look() -> None:
        while True:
            for seconds in (3600, -3600):
                if orders.take(f"clock@{seconds}"):
                    ahead[0] += seconds
            time.sleep(CLOCK_LOOK_S)

    threading.Thread(target=look, name="clock", daemon=True).start()


class Commits:
    """`lost`: the commit is done and the caller is told that it failed. `refused`: it is not done."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.armed = False

    def adopt(self) -> None:
        make_async = databases.create_async

        def create_async(url: str) -> Any:
            made = make_async(url)
            dialect: Any = made.sync_engine.dialect
            dialect.do_commit = partial(self._commit, dialect, dialect.do_commit)
            return made

        databases.create_async = create_async

    def _commit(self, dialect: Any, commit: Callable[[Any], None], connection: Any) -> None:
        error = dialect.loaded_dbapi.OperationalError
        if self.orders.take("refused_commit"):
            raise error("injected: COMMIT was refused")
        commit(connection)
        if self.armed or self.orders.take("lost_commit@any"):
            self.armed = False
            raise error("injected: the answer to COMMIT was lost")

    def arm(self, moment: str) -> None:
        """The next commit of this process is lost if that was ordered for this moment."""
        self.armed = self.armed or self.orders.take(f"lost_commit@{moment}")


def full_disk(orders: Orders) -> None:
    """Wherever a supervisor writes: a checkpoint (in the middle), a batch, a trace."""
    from workers import training

    def out_of_space(kind: str, write: Callable[..., Any], *arguments: Any) -> Any:
        if orders.take(f"disk_full@{kind}"):
            raise OSError(errno.ENOSPC, "injected: no space left on device")
        return write(*arguments)

    for module, name, kind in (
        (store, "sync", "checkpoint"),
        (training, "write_batch", "batch"),
        (traces, "append_trace", "trace"),
    ):
        setattr(module, name, partial(out_of_space, kind, getattr(module, name)))


def frozen_writing(orders: Orders) -> None:
    """A supervisor may be told to stop when a checkpoint is written but for its manifest's fsync and the rename."""

    def stopping(sync: Callable[[Path], None], path: Path) -> None:
        if path.name == store.MANIFEST and orders.take("freeze_writing"):
            _await_idle_database(Settings().database)
            orders.freeze_myself()
        sync(path)

    name = "sync"
    setattr(store, name, partial(stopping, getattr(store, name)))


def _await_idle_database(url: str) -> None:
    """A process that stops inside a transaction keeps SQLite's write lock, and nobody else could write anything."""
    if url.startswith("sqlite"):
        path = databases.async_url(url).database or ""
        with contextlib.closing(sqlite3.connect(path, timeout=20, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")


def slow_disk(seconds: float) -> None:
    """Every fsync of a checkpoint takes this long, as on a busy disk: a window of milliseconds stays open."""

    def slowly(sync: Callable[[Path], None], path: Path) -> None:
        time.sleep(seconds)
        sync(path)

    name = "sync"
    setattr(store, name, partial(slowly, getattr(store, name)))


def supervisor(orders: Orders) -> None:
    """Everything above in a supervisor's process, its identity, its trainer, and the mutation if one is asked for."""
    from workers import run
    from workers.registry import Registry

    identity, commits = Identity(), Commits(orders)
    identity.adopt()
    commits.adopt()
    full_disk(orders)
    frozen_writing(orders)
    slow_disk(float(os.environ["CHAOS_SYNC_S"]))
    jumping_clock(orders)
    mutation = os.environ.get("CHAOS_MUTATION")
    if mutation:
        {"fence": without_fence, "directory": shared_directory, "late_ack": unguarded_claim}[mutation]()
    _remember_claim(identity, commits)
    for name in ("step_done", "checkpoint", "succeeded"):
        setattr(Registry, name, _armed(commits, name, getattr(Registry, name)))
    if os.environ["CHAOS_TRAINER"] == "tiny":
        run.TrainerLink = partial(run.TrainerLink, command=TINY_TRAINER)  # type: ignore[assignment, attr-defined]


def _remember_claim(identity: Identity, commits: Commits) -> None:
    claim = leases.claim

    async def remembered(*arguments: Any, **keywords: Any) -> Any:
        won = await claim(*arguments, **keywords)
        if won is not None:
            identity.attempt = won.fence.attempt
            commits.arm("claim")
        return won

    leases.claim = remembered


def _armed(commits: Commits, moment: str, method: Callable[..., Any]) -> Callable[..., Any]:
    async def armed(*arguments: Any, **keywords: Any) -> Any:
        commits.arm(moment)
        return await method(*arguments, **keywords)

    return armed


# --- mutations: each takes away one thing that the design rests on ----------------------------------------------------


def without_fence() -> None:
    """A worker's writes no longer say which attempt they are of."""

    async def fenced(session: Any, fence: leases.Fence, **values: Any) -> None:
        if values:
            await session.execute(update(Job).where(Job.id == fence.job_id).values(**values))

    def renew(engine: Any, fence: leases.Fence, lease_s: float) -> bool:
        with engine.begin() as connection:
            running = Job.id == fence.job_id, Job.status == "running"
            connection.execute(update(Job).where(*running).values(lease_until=databases.now() + lease_s))
        return True

    leases.fenced, leases.renew = fenced, renew


def shared_directory() -> None:
    """The attempt is left out of the paths of checkpoints and snapshots, and what is there already is replaced."""
    from workers import run
    from workers import supervisor as program

    publish, key_of = store.publish, store.key_of

    def replacing(source: Path, target: Path, facts: dict[str, Any]) -> str:
        apart = target.with_name(f"{target.name}.by-{os.getpid()}")
        digest = publish(source, apart, facts)
        shutil.rmtree(target, ignore_errors=True)
        apart.rename(target)
        return digest

    class SharedRun(run.Run):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.dir = self.dir.parent / "a0"

    store.publish = replacing
    store.key_of = lambda job_id, attempt, step: key_of(job_id, 0, step)
    program.Run = SharedRun  # type: ignore[assignment, attr-defined]


def unguarded_claim() -> None:
    """Whoever holds a message runs the job: what late acknowledgement makes of one that is delivered again."""
    claim = leases.claim

    async def anyhow(session: Any, job_id: str, **keywords: Any) -> Any:
        free = update(Job).where(Job.id == job_id, Job.plan.is_not(None))
        await session.execute(free.values(status="queued", **leases.given_up()))
        return await claim(session, job_id, **keywords)

    leases.claim = anyhow
