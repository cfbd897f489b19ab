"""What `hone doctor` says of the database: reached or not and why, its revision, its clock against ours.

Does not cover: what the rows are sealed and hashed with (`doctor_secrets`), which is judged from the same look.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.cli import doctor_secrets
from app.cli.findings import DEADLINE_S, Finding, NoAnswer, Verdict, quoted, within

if TYPE_CHECKING:
    from sqlalchemy import URL, Engine

    from app.core.settings import Settings

NAME = "database"
CLOCK_S = 5.0  # apart
SAMPLE = 200  # rows of each kind whose secrets are tried, newest first
USE_RIGHT = "set the right user and password in HONE_DATABASE_URL, special characters as %XX"
# What a driver's message says → what to do; the first that fits. {host}, {port}, {name} and {user} are the URL's.
MENDS: tuple[tuple[str, str], ...] = (
    ("password authentication failed", USE_RIGHT),
    ("no password supplied", USE_RIGHT),
    ("no pg_hba.conf entry", "let this host and user in: pg_hba.conf of the server at {host}"),
    ('database "', "create it: createdb -h {host} -p {port} -U {user} {name}; `hone api` makes the tables"),
    ('role "', "create the user: createuser -h {host} -p {port} {user}; or name another in HONE_DATABASE_URL"),
    ("refused", "start PostgreSQL at {host}:{port}, or name another host and port in HONE_DATABASE_URL"),
    ("resolve", "the host in HONE_DATABASE_URL is not known here: check its spelling, and name resolution"),
    ("too many", "raise max_connections of the server, or stop what holds connections"),
    ("no answer", "check host and port in HONE_DATABASE_URL, the network and firewalls between"),
    ("timeout expired", "check host and port in HONE_DATABASE_URL, the network and firewalls between"),
    ("closed the connection", "no PostgreSQL answers there: check host and port in HONE_DATABASE_URL"),
    ("readonly", "make it writable for this user, with its directory: chown -R $(id -u) {folder}"),
    ("unable to open", "make it and its directory readable and writable for this user: chown -R $(id -u) {folder}"),
    ("locked", "stop the process that holds it: fuser {name}"),
    ("not a database", "it is damaged or something else: put a backup in its place"),
    ("malformed", "it is damaged: put a backup in its place"),
)


@dataclass(frozen=True)
class Seen:
    """One look. `ahead_s`: our clock minus the database's. `stored` only where the tables are as this code knows."""

    revision: str | None
    known: Sequence[str]  # what this code has heard of, newest first
    ahead_s: float = 0.0
    stored: doctor_secrets.Stored = field(default_factory=doctor_secrets.Stored)


def database(settings: Settings) -> Iterator[Finding]:
    """The database, and what only it can tell: clock, keys, secrets."""
    from alembic.script import ScriptDirectory
    from sqlalchemy.exc import SQLAlchemyError

    from app.db import migrate
    from app.db.engine import UnsupportedDatabase, async_url, create_sync

    url = settings.database
    try:
        parsed = async_url(url)
    except UnsupportedDatabase as error:
        yield Finding(NAME, Verdict.PROBLEM, f"HONE_DATABASE_URL: {error}", "postgresql://USER:PASSWORD@HOST:5432/NAME")
        return
    except ValueError:
        detail = "HONE_DATABASE_URL cannot be read: its port is no number"
        yield Finding(NAME, Verdict.PROBLEM, detail, "postgresql://USER:PASSWORD@HOST:5432/NAME")
        return
    if "@" in (parsed.host or ""):
        detail = "HONE_DATABASE_URL has an @ in its password"
        yield Finding(NAME, Verdict.PROBLEM, detail, "write it as %40 (a / as %2F, a : as %3A)")
        return
    where = place(parsed)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").exists():
        yield Finding(NAME, Verdict.OK, f"{where}: none yet; `hone up` or `hone api` makes it")
        return
    scripts = ScriptDirectory.from_config(migrate.config(url))
    known = [script.revision for script in scripts.walk_revisions()]  # newest first; imports take longer than a look
    engine = create_sync(url)
    try:
        seen = within(lambda: look(engine, known), DEADLINE_S)
    except (SQLAlchemyError, OSError, NoAnswer) as error:
        reason = quoted(getattr(error, "orig", None) or error, url).rpartition(" failed: ")[2]  # where is said already
        yield Finding(NAME, Verdict.PROBLEM, f"{where}: {reason}", mend(reason, parsed))
        return
    yield revision(where, seen)
    yield from clock(seen.ahead_s)
    if seen.revision == seen.known[0]:
        yield from doctor_secrets.findings(settings, seen.stored)


def look(engine: Engine, known: Sequence[str]) -> Seen:
    """`known`: the revisions of this code, newest first. Blocking. Raises SQLAlchemy's errors."""
    from sqlalchemy import inspect, select, text

    from app.db.engine import now

    try:
        with engine.connect().execution_options(hone_read_only=True) as connection:
            before = time.time()
            theirs = connection.scalar(select(now())) or 0.0
            ahead_s = (before + time.time()) / 2 - theirs
            found = None
            if inspect(connection).has_table("alembic_version"):
                found = connection.scalar(text("SELECT version_num FROM alembic_version"))
            stored = doctor_secrets.read(connection, SAMPLE) if found == known[0] else doctor_secrets.Stored()
            return Seen(found, known, ahead_s, stored)
    finally:
        engine.dispose()


def revision(where: str, seen: Seen) -> Finding:
    """Old tables are a warning: whoever is started next mends them, and that may be the next command."""
    if seen.revision == seen.known[0]:
        return Finding(NAME, Verdict.OK, f"{where}, revision {seen.revision}")
    migrates = "start `hone up` or `hone api`: both migrate"
    if seen.revision is None:
        return Finding(NAME, Verdict.WARNING, f"{where} has no tables yet", migrates)
    if seen.revision in seen.known:
        old = f"{where} is at revision {seen.revision}, this code needs {seen.known[0]}"
        return Finding(NAME, Verdict.WARNING, old, f"{migrates}, and workers wait for it")
    newer = f"{where} is at revision {seen.revision}, which is newer than this code ({seen.known[0]})"
    return Finding(NAME, Verdict.PROBLEM, newer, "pip install --upgrade hone-rft, as where the API runs")


def clock(ahead_s: float) -> Iterator[Finding]:
    """Leases go by the database's clock and are safe; what is told by ours would not fit the rows."""
    if abs(ahead_s) > CLOCK_S:
        side = "ahead of" if ahead_s > 0 else "behind"
        yield Finding(
            "clock",
            Verdict.WARNING,
            f"this host is {abs(ahead_s):.0f} s {side} the database: logs and ages of files do not fit the rows",
            "set both by NTP: timedatectl set-ntp true",
        )


def place(url: URL) -> str:
    """Where it is, without user and password."""
    if url.get_backend_name() == "sqlite":
        return str(url.database or ":memory:")
    return "PostgreSQL {host}:{port}/{name}".format(**_parts(url))


def mend(reason: str, url: URL) -> str:
    for said, fix in MENDS:
        if said in reason:
            return fix.format(**_parts(url))
    return "check HONE_DATABASE_URL"


def _parts(url: URL) -> Mapping[str, Any]:
    host = url.host or url.query.get("host") or "the local socket"
    name = url.database or url.username
    folder = Path(url.database or ".").parent
    return {"host": host, "port": url.port or 5432, "name": name, "user": url.username or "postgres", "folder": folder}
