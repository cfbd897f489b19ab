"""The doctor on Redis: real servers, right and wrong passwords, and what they would forget."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from app.cli import doctor_broker
from app.cli.doctor_broker import broker
from app.cli.findings import Finding, Verdict
from app.core.settings import Settings
from tests.broker import free_port, server

PASSWORD = "canary-0815"
KEPT = ["CONFIG SET maxmemory-policy noeviction", "CONFIG SET appendonly yes"]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host under load answers late; what a test waits for in vain sets a time of its own."""
    monkeypatch.setattr(doctor_broker, "DEADLINE_S", 30.0)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server with a password, no append-only file, and a policy that throws keys away."""
    port = free_port()
    options = ["--save", "", "--appendonly", "no", "--maxmemory-policy", "allkeys-lru"]
    with server(port, *options, password=PASSWORD, folder=tmp_path_factory.mktemp("redis")):
        yield port


def look(url: str | None) -> list[Finding]:
    found = list(broker(Settings(data_dir=Path("/nowhere"), redis_url=url)))
    assert PASSWORD not in str(found)
    return found


def test_what_it_would_throw_away_or_forget_is_told_with_the_command_that_mends_it(port: int) -> None:
    url = f"redis://:{PASSWORD}@127.0.0.1:{port}/0"
    there, policy, append = look(url)
    assert (there.verdict, there.detail.endswith(f" at 127.0.0.1:{port}/0")) == (Verdict.OK, True)
    assert policy.verdict is append.verdict is Verdict.WARNING
    said = [f"redis-cli -u redis://127.0.0.1:{port}/0 {each}; and in redis.conf" for each in KEPT]
    assert [policy.fix, append.fix] == said
    with redis.Redis.from_url(url) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("appendonly", "yes")
    assert [each.verdict for each in look(url)] == [Verdict.OK]


@pytest.mark.parametrize("userinfo", [f":{PASSWORD}x@", f"eve:{PASSWORD}@", ""])
def test_a_wrong_password_warns_because_workers_look_by_themselves(port: int, userinfo: str) -> None:
    [found] = look(f"redis://{userinfo}127.0.0.1:{port}/0")
    assert found.verdict is Verdict.WARNING
    assert f"127.0.0.1:{port}/0 refuses the password" in found.detail
    assert "HONE_REDIS_URL" in (found.fix or "")


def test_nobody_there(port: int) -> None:
    gone = free_port()
    [found] = look(f"redis://:{PASSWORD}@127.0.0.1:{gone}/0")
    assert found.verdict is Verdict.WARNING
    assert f"127.0.0.1:{gone}/0 does not answer" in found.detail
    assert found.fix == "start Redis there, or name another in HONE_REDIS_URL"


def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_broker, "DEADLINE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        [found] = look(f"redis://:{PASSWORD}@127.0.0.1:{silent.getsockname()[1]}/0")
    assert "does not answer" in found.detail
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("url", [f"redis://:a/{PASSWORD}@host:1/0", f"redis://:{PASSWORD}@host:x/0"])
def test_a_url_that_cannot_be_right_blocks_and_is_not_repeated(url: str) -> None:
    [found] = look(url)
    assert (found.verdict, found.detail) == (Verdict.PROBLEM, "HONE_REDIS_URL cannot be read")


def test_without_a_broker_nothing_is_wrong() -> None:
    assert [found.verdict for found in look(None)] == [Verdict.OK]


def test_a_broker_without_celery_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_broker, "find_spec", lambda name: None)
    [found] = look("redis://127.0.0.1:1/0")
    assert (found.verdict, found.fix) == (Verdict.PROBLEM, "pip install 'hone-rft[celery]'")
