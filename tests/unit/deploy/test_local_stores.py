"""The local topology's own PostgreSQL and Redis: closed by a password, and what was written is there after kill -9."""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from deploy.local.ports import free_port
from deploy.local.postgres import Postgres
from deploy.local.program import Kept, TopologyFailed
from deploy.local.redis_server import RedisServer


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not below pytest's: that is closed to the user that root's PostgreSQL runs as."""
    with TemporaryDirectory(prefix="hone-local-") as made:
        Path(made).chmod(0o711)
        yield Path(made)


@contextmanager
def _up(store: Postgres | RedisServer, folder: Path) -> Iterator[Kept]:
    store.prepare()
    kept = Kept(store.program(), folder / "log", lambda line: None)
    kept.start()
    try:
        kept.await_health()
        yield kept
    finally:
        kept.ask_to_end()
        kept.await_end()


def _killed_and_back(kept: Kept) -> None:
    """The first start may find what the dead held still in use; then there is a second."""
    os.killpg(kept.group, signal.SIGKILL)
    while kept.alive:
        time.sleep(0.01)
    deadline = time.monotonic() + 30
    while kept.program.missing() is not None:
        assert time.monotonic() < deadline
        kept.look()
        time.sleep(0.05)


def test_postgres_syncs_its_commits_and_they_outlive_kill_9(folder: Path) -> None:
    store = Postgres(folder / "postgres", free_port())
    with _up(store, folder) as kept:
        with psycopg.connect(store.url, autocommit=True) as connection:
            for setting in ("fsync", "full_page_writes", "synchronous_commit"):
                assert connection.execute(f"SHOW {setting}").fetchone() == ("on",)  # type: ignore[arg-type]
            connection.execute("CREATE TABLE kept (n int); INSERT INTO kept VALUES (7)")
        _killed_and_back(kept)
        with psycopg.connect(store.url) as connection:
            assert connection.execute("SELECT n FROM kept").fetchone() == (7,)
    assert "database system is shut down" in (folder / "log").read_text()


def test_postgres_asks_for_the_password_and_the_folder_keeps_it_from_others(folder: Path) -> None:
    store = Postgres(folder / "postgres", free_port())
    with _up(store, folder), pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(store.url.replace(store.password, "guess"))
    _private(folder)


def test_postgres_that_root_runs_says_whom_it_must_let_in(folder: Path) -> None:
    store = Postgres(folder / "postgres", free_port())
    if store.runs_as is None:
        pytest.skip("only root's server runs as another user")
    folder.chmod(0o700)
    with pytest.raises(TopologyFailed) as caught:
        store.prepare()
    assert f"{store.runs_as.pw_name}, who must be able to enter {folder}" in str(caught.value.fix)
    assert not (folder / "postgres").exists()  # or the next start would take it for a cluster


def test_redis_keeps_its_file_and_asks_for_the_password(folder: Path) -> None:
    store = RedisServer(folder / "redis", free_port())
    with _up(store, folder) as kept:
        with redis.Redis.from_url(store.url) as client:
            assert client.config_get("appendfsync")["appendfsync"] == "everysec"  # type: ignore[index]
            assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"  # type: ignore[index]
            client.config_set("appendfsync", "always")  # so that the test need not wait for the second
            client.set("rung", "x")
        _killed_and_back(kept)
        with redis.Redis.from_url(store.url) as client:
            assert client.get("rung") == b"x"
        once = Retry(NoBackoff(), 0)
        with redis.Redis(port=store.port, retry=once) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
    _private(folder)


def _private(folder: Path) -> None:
    """Nothing in it but logs is readable for others."""
    for path in folder.iterdir():
        if path.name != "log":
            assert not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO), path
