"""The doctor on databases: each fault with its mend, on real servers, and no password in any line."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import URL, make_url

from app.cli import doctor_database
from app.cli.doctor_database import database
from app.cli.findings import Finding, Verdict
from app.core.settings import Settings
from app.db import migrate
from app.db.engine import create_sync
from tests import postgres as real
from tests.broker import free_port

PASSWORD = "canary-4711"


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host under load answers late; what a test waits for in vain sets a time of its own."""
    monkeypatch.setattr(doctor_database, "DEADLINE_S", 30.0)


@pytest.fixture(scope="module")
def server() -> Iterator[real.Server]:
    """One of our own: its rules on who may come in are changed."""
    try:
        with real.server(own=True) as started:
            yield started
    except real.NoPostgres as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def guarded(server: real.Server) -> URL:
    """A migrated database that the user `hone` reaches with a password, and nobody else at all."""
    url = make_url(server.create_database())
    with psycopg.connect(server.url.render_as_string(False), autocommit=True) as connection:
        connection.execute(f"CREATE ROLE hone LOGIN SUPERUSER PASSWORD '{PASSWORD}'")
        rules = f"local all {server.url.username} trust\nlocal all hone scram-sha-256\n"
        Path(server.engine.pgdata, "pg_hba.conf").write_text(rules)
        connection.execute("SELECT pg_reload_conf()")
    time.sleep(0.5)  # the server reads it in its own time
    return url.set(username="hone", password=PASSWORD)


def look(tmp_path: Path, url: URL | str) -> list[Finding]:
    text = url if isinstance(url, str) else url.render_as_string(hide_password=False)
    found = list(database(Settings(data_dir=tmp_path, database_url=text)))
    assert PASSWORD not in str(found)
    return found


def test_a_migrated_database_is_named_without_its_user(guarded: URL, tmp_path: Path) -> None:
    found, *rest = look(tmp_path, guarded)
    assert found.verdict is Verdict.OK
    assert f":5432/{guarded.database}, revision " in found.detail
    assert [each.name for each in rest] == ["secrets", "keys"]


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ({"password": f"{PASSWORD}x"}, "set the right user and password in HONE_DATABASE_URL"),
        ({"username": "eve"}, "let this host and user in: pg_hba.conf of the server at "),
        ({"database": "nowhere"}, "create it: createdb -h "),
        ({"host": "no-such-host.invalid", "query": {}}, "the host in HONE_DATABASE_URL is not known here"),
    ],
)
def test_a_server_that_refuses_blocks_with_what_it_said(
    guarded: URL, tmp_path: Path, change: dict[str, Any], fix: str
) -> None:
    [found] = look(tmp_path, guarded.set(**change))
    assert found.verdict is Verdict.PROBLEM
    assert (found.fix or "").startswith(fix)


def test_a_url_without_its_password(guarded: URL, tmp_path: Path) -> None:
    nameless = URL.create("postgresql", "hone", database=guarded.database, query=guarded.query)
    [found] = look(tmp_path, nameless)
    assert (found.fix or "").startswith("set the right user and password in HONE_DATABASE_URL")


def test_nobody_at_the_port(tmp_path: Path) -> None:
    port = free_port()
    [found] = look(tmp_path, f"postgresql://hone:{PASSWORD}@127.0.0.1:{port}/hone")
    assert found.verdict is Verdict.PROBLEM
    assert found.fix == f"start PostgreSQL at 127.0.0.1:{port}, or name another host and port in HONE_DATABASE_URL"


def test_a_server_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_database, "DEADLINE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        [found] = look(tmp_path, f"postgresql://hone:{PASSWORD}@127.0.0.1:{silent.getsockname()[1]}/hone")
    assert found.verdict is Verdict.PROBLEM
    assert "no answer within 0.3 s" in found.detail
    assert "firewalls" in (found.fix or "")


@pytest.mark.parametrize(
    "url", [f"postgresql://hone:a@{PASSWORD}@127.0.0.1/hone", f"postgresql://hone:{PASSWORD}@host:x/y", PASSWORD]
)
def test_a_url_that_cannot_be_right_is_not_repeated(tmp_path: Path, url: str) -> None:
    [found] = look(tmp_path, url)
    assert found.verdict is Verdict.PROBLEM
    assert "HONE_DATABASE_URL" in found.detail


def test_a_database_without_tables_and_an_old_one_warn_and_a_newer_one_blocks(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    assert next(database(settings)).detail.endswith("none yet; `hone up` or `hone api` makes it")
    (tmp_path / "hone.db").touch()
    empty = next(database(settings))
    assert (empty.verdict, empty.fix) == (Verdict.WARNING, "start `hone up` or `hone api`: both migrate")
    migrate.upgrade(settings.database)
    assert next(database(settings)).verdict is Verdict.OK
    assert _marked(settings, "'from_the_future'").verdict is Verdict.PROBLEM
    assert _marked(settings, "NULL").verdict is Verdict.WARNING


def _marked(settings: Settings, revision: str) -> Finding:
    engine = create_sync(settings.database)
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM alembic_version")
        if revision != "NULL":
            connection.exec_driver_sql(f"INSERT INTO alembic_version VALUES ({revision})")
    engine.dispose()
    return next(database(settings))


def test_an_older_revision_of_this_code_is_told_from_a_newer_one() -> None:
    old = doctor_database.revision("here", doctor_database.Seen("one", ["two", "one"]))
    assert (old.verdict, old.detail) == (Verdict.WARNING, "here is at revision one, this code needs two")


def test_a_clock_that_is_apart_from_the_database_warns(guarded: URL, tmp_path: Path) -> None:
    """The server's functions are looked up in a schema of ours first, where its clock is late."""
    with psycopg.connect(guarded.render_as_string(False), autocommit=True) as connection:
        connection.execute("CREATE SCHEMA late")
        connection.execute(
            "CREATE FUNCTION late.clock_timestamp() RETURNS timestamptz LANGUAGE sql"
            " AS $$ SELECT pg_catalog.clock_timestamp() - interval '90 s' $$"
        )
        connection.execute(f"ALTER DATABASE {guarded.database} SET search_path = late, pg_catalog, public")
    try:
        clock = next(found for found in look(tmp_path, guarded) if found.name == "clock")
        assert clock.verdict is Verdict.WARNING
        assert clock.detail.startswith("this host is 90 s ahead of the database")
    finally:
        with psycopg.connect(guarded.render_as_string(False), autocommit=True) as connection:
            connection.execute(f"ALTER DATABASE {guarded.database} RESET search_path")


def test_a_writer_does_not_hold_the_look_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(data_dir=tmp_path)
    migrate.upgrade(settings.database)
    monkeypatch.setattr(doctor_database, "DEADLINE_S", 8.0)  # below the patience of SQLite itself
    engine = create_sync(settings.database)
    with engine.begin():
        assert next(database(settings)).verdict is Verdict.OK
    engine.dispose()


def test_a_damaged_file_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "hone.db").write_bytes(b"not SQLite at all" * 1000)
    [found] = database(Settings(data_dir=tmp_path))
    assert (found.verdict, found.fix) == (
        Verdict.PROBLEM, "it is damaged or something else: put a backup in its place",
    )  # fmt: skip
