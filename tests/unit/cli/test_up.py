"""`hone up` as a person starts it: it says where it is, can take a job, and takes everything along when it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from openai import OpenAI

from app.cli.up import listen
from app.core.settings import Settings
from tests.processes import of_data
from tests.unit.cli.test_command import hone

START_S = 90.0


@contextmanager
def _up(data: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `hone up` on a free port, and its URL. It is killed at the end if the test did not stop it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HONE_")}
    command = [sys.executable, "-m", "app.cli.main", "up", "--port", "0", "--data", str(data)]
    process = subprocess.Popen(command, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        found = re.search(r"(http://\S+)/v1", process.stdout.readline())
        assert found is not None, process.stdout.read()
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _healthy(url: str) -> None:
    deadline, last = time.monotonic() + START_S, ""
    while time.monotonic() < deadline:
        answer = httpx.get(f"{url}/healthz", timeout=30)
        if answer.status_code == 200:
            return
        last = answer.text
        time.sleep(0.2)
    raise AssertionError(f"not healthy: {last}")


def test_it_serves_can_take_a_job_and_ends_in_order(tmp_path: Path) -> None:
    with _up(tmp_path) as (process, url):
        _healthy(url)
        key = hone("keys", "create", "me", data=tmp_path).stdout.strip()
        with OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
            assert client.models.list().data == []
        second = hone("up", "--port", "0", data=tmp_path)
        assert second.returncode == 1
        assert f"process {process.pid}" in second.stderr
        assert len(of_data(tmp_path)) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert of_data(tmp_path) == []


def test_killed_at_once_it_leaves_no_process_behind(tmp_path: Path) -> None:
    with _up(tmp_path) as (process, url):
        _healthy(url)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 60
        while of_data(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert of_data(tmp_path) == []


def test_answers_do_not_wait_for_a_delayed_acknowledgement(tmp_path: Path) -> None:
    with listen(Settings(data_dir=tmp_path, port=0)) as listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_a_port_in_use_is_one_line_with_a_fix(tmp_path: Path) -> None:
    with _up(tmp_path / "one") as (_, url):
        done = hone("up", "--port", url.rsplit(":", 1)[1], data=tmp_path / "two")
    assert done.returncode == 1
    assert "Address already in use" in done.stderr
    assert "fix:   hone up --port 0" in done.stderr
