"""A whole installation for the storm: data directory, a real database, and the service's processes, started again when
they end, as a process manager does.

Does not cover: an API process; the storm creates jobs itself, through the API's own code (`jobs`).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psycopg

from app.core.settings import Settings
from app.db import engine as databases
from app.db import migrate
from tests import postgres
from tests.broker import Broker, broker_running, free_port
from tests.chaos import audit
from tests.chaos.orders import Orders
from tests.tiny import make_weightless_llama
from workers.process import Child, spawn

LEASE_S = 4.0
MAX_CRASHES = 8  # a storm kills the same job again within a step far more often than the default of 3 allows for
MODEL = "tiny"
RESTART_S = 0.3
DOORS = {"sqlite": ("runner", "slot", "slot", "janitor"), "postgresql": ("celery", "celery", "slot", "janitor")}


class StormDatabase(Protocol):
    name: str

    def fault(self, seconds: float) -> None:
        """Away for about that long. Blocks."""


@dataclass(frozen=True)
class Sqlite(StormDatabase):
    """Another program holds the write lock: beyond ten seconds "database is locked" comes back."""

    path: Path
    name: str = "sqlite"

    def fault(self, seconds: float) -> None:
        with contextlib.closing(sqlite3.connect(self.path, timeout=20, isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            time.sleep(seconds)
            connection.execute("ROLLBACK")


@dataclass(frozen=True)
class Postgres(StormDatabase):
    """The server is stopped as by a power cut, and started again."""

    server: postgres.Server
    name: str = "postgresql"

    def fault(self, seconds: float) -> None:
        self.server.stop(crash=True)
        time.sleep(min(seconds, 2.0))
        self.server.start()


@contextlib.contextmanager
def database_of(kind: str, root: Path) -> Iterator[tuple[StormDatabase, str]]:
    """A migrated database with the audit in it, and its URL."""
    if kind == "sqlite":
        path = root / "data" / "hone.db"
        path.parent.mkdir(parents=True)
        url = f"sqlite:///{path}"
        migrate.upgrade(url)
        _audited(url)
        yield Sqlite(path), url
        return
    with postgres.server(own=True) as server:
        # The tests' server forgets what it has not written yet; this one is stopped to find out who relies on a commit.
        dsn = server.url.render_as_string(hide_password=False)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET synchronous_commit = 'on'")
        server.restart()
        url = server.create_database()
        _audited(url)
        yield Postgres(server), url


def _audited(url: str) -> None:
    engine = databases.create_sync(url)
    audit.install(engine)
    engine.dispose()


@dataclass
class Managed:
    """A process that is started again. `kind` is what `tests.chaos.door` calls it."""

    kind: str
    number: int
    child: Child | None = None
    ended: float = 0.0


@dataclass
class Installation:
    root: Path
    database: StormDatabase
    settings: Settings
    orders: Orders
    environment: Mapping[str, str]
    broker: BrokerHandle | None
    doors: Sequence[Managed]
    _stop: threading.Event = field(default_factory=threading.Event)
    _manager: threading.Thread | None = None

    def start(self) -> None:
        self._manager = threading.Thread(target=self._manage, name="manager")
        self._manager.start()

    def _manage(self) -> None:
        while not self._stop.wait(0.1):
            for door in self.doors:
                if door.child is not None and door.child.poll() is not None:
                    door.child.kill()
                    door.child, door.ended = None, time.monotonic()
                if door.child is None and time.monotonic() - door.ended > RESTART_S and not self._stop.is_set():
                    door.child = self._spawn(door)

    def _spawn(self, door: Managed) -> Child:
        return spawn(
            (sys.executable, "-m", "tests.chaos.door", door.kind),
            log=self.root / "logs" / f"{door.kind}-{door.number}.log",
            environment=self.environment,
            trusted=True,
        )

    def stop(self, grace_s: float = 40.0) -> None:
        """In order, as an operator would; what is left then is killed by its own leash."""
        self._stop.set()
        if self._manager is not None:
            self._manager.join()
        running = [door.child for door in self.doors if door.child is not None]
        for child in running:
            child.terminate()
        deadline = time.monotonic() + grace_s
        for child in running:
            child.stop(max(0.1, deadline - time.monotonic()))
        for door in self.doors:
            door.child = None
        if self.broker is not None:
            self.broker.close()

    def processes(self, *needles: str) -> list[int]:
        """This installation's processes whose command line holds all of `needles`."""
        mark, found = f"HONE_DATA_DIR={self.settings.root}".encode(), []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if line and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append((int(entry.name), line))
            except OSError:
                continue
        return sorted(pid for pid, line in found if all(needle in line for needle in needles))


class BrokerHandle:
    """A Redis without persistence that can be emptied, and can be away."""

    def __init__(self) -> None:
        self._port = free_port()
        self._stack = contextlib.ExitStack()
        self.broker: Broker = self._stack.enter_context(broker_running(self._port))

    def away(self, seconds: float) -> None:
        """Comes back empty."""
        self._stack.close()
        time.sleep(seconds)
        self.broker = self._stack.enter_context(broker_running(self._port))

    def close(self) -> None:
        self._stack.close()


@contextlib.contextmanager
def installation(
    kind: str,
    root: Path,
    *,
    models: Path | None = None,
    mutation: str | None = None,
    sync_s: float = 0.02,
    lease_s: float = LEASE_S,
) -> Iterator[Installation]:
    """`models`: a directory with a real model, for the real engine and trainer; without it, the storm's own."""
    orders = Orders(root / "orders")
    orders.prepare()
    with database_of(kind, root) as (database, url):
        doors = DOORS[kind]
        broker = BrokerHandle() if "celery" in doors else None
        data = root / "data"
        if models is None:
            make_weightless_llama(data / "models" / MODEL)
        else:
            data.mkdir(exist_ok=True)
            (data / "models").symlink_to(models)
        settings = Settings(
            data_dir=data,
            database_url=url,
            redis_url=broker.broker.url if broker else None,
            lease_seconds=lease_s,
            max_crashes=MAX_CRASHES,
            sampler_max_adapters=16 if models else 64,
            sampler_engine="builtin",
            sampler_dtype="float32",
            threads=1,
        )
        environment = {
            **settings.environment(),
            "CHAOS_DIR": str(orders.root),
            "CHAOS_TRAINER": "tiny" if models is None else "real",
            "CHAOS_SYNC_S": str(sync_s),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
            **({"CHAOS_MUTATION": mutation} if mutation else {}),
        }
        managed = [Managed(door, number) for number, door in enumerate((*doors, "keeper"))]
        made = Installation(root, database, settings, orders, environment, broker, managed)
        made.start()
        try:
            yield made
        finally:
            made.stop()
