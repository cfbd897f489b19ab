from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

START_S = 60.0


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_it_serves_alone_logs_json_and_ends_when_asked(tmp_path: Path, port: int) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HONE_")}
    environment |= {"HONE_DATA_DIR": str(tmp_path / "data"), "HONE_LOG_FORMAT": "json"}
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli.main", "api", "--port", str(port)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        ready = _wait(f"http://127.0.0.1:{port}/readyz", process)
        assert (ready.status_code, ready.json()["missing"]) == (200, {})
        healthy = httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=10)
        assert list(healthy.json()["missing"]) == ["runner"]  # nobody was started beside it
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode in (0, -signal.SIGTERM)
    assert all(line.startswith("{") for line in errors.splitlines()), errors


def _wait(url: str, process: subprocess.Popen[str]) -> httpx.Response:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            return httpx.get(url, timeout=10)
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("the API did not start")
