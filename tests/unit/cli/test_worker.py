"""`hone worker` and `hone sampler` as a person starts them: wrong use is told at once, SIGTERM takes all along."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.core.settings import Settings
from app.db import migrate
from tests.broker import broker_running
from tests.processes import of_data
from tests.unit.cli.test_command import hone

START_S = 90.0
REDIS = "redis://127.0.0.1:1/0"


@contextmanager
def _started(data: Path, *arguments: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HONE_")}
    command = [sys.executable, "-m", "app.cli.main", *arguments, "--data", str(data)]
    process = subprocess.Popen(command, env={**kept, **env}, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def _log_says(log: Path, text: str) -> None:
    deadline = time.monotonic() + START_S
    while not (log.exists() and text in log.read_text()):
        assert time.monotonic() < deadline, log.read_text() if log.exists() else f"no {log}"
        time.sleep(0.05)


def _prepared(data: Path) -> Settings:
    settings = Settings(data_dir=data)
    settings.root.mkdir(parents=True)
    migrate.upgrade(settings.database)
    return settings


def test_a_worker_for_each_set_of_gpus_and_a_janitor_and_all_end_together(tmp_path: Path) -> None:
    settings = _prepared(tmp_path / "data")
    logs = settings.logs_dir / settings.hostname
    with broker_running() as broker:
        arguments = ("worker", "--gpus", "0,1", "--gpus", "2", "--queue", "a,b")
        with _started(settings.root, *arguments, HONE_REDIS_URL=broker.url) as process:
            for number in (0, 1):
                _log_says(logs / f"worker-{number}.log", " ready.")
            running = " | ".join(of_data(settings.root))
            assert "workers.tasks --queue a,b --gpus 0,1 " in running
            assert "workers.tasks --queue a,b --gpus 2 " in running
            assert "workers.janitor" in running
            process.send_signal(signal.SIGTERM)
            assert process.wait(START_S) == 0
            assert of_data(settings.root) == []


def test_a_sampler_host_runs_a_keeper(tmp_path: Path) -> None:
    settings = _prepared(tmp_path / "data")
    with _started(settings.root, "sampler") as process:
        assert process.stderr is not None
        assert "keeping the keeper" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(START_S) == 0
    assert of_data(settings.root) == []


@pytest.mark.parametrize(
    ("arguments", "env", "says"),
    [
        ((), {}, "HONE_REDIS_URL is not set"),
        (("--gpus", "0,x"), {"HONE_REDIS_URL": REDIS}, "--gpus '0,x'"),
        (("--gpus", "0,1", "--gpus", "1"), {"HONE_REDIS_URL": REDIS}, "one GPU is in two sets"),
        ((), {"HONE_REDIS_URL": REDIS, "HONE_QUEUES": "large"}, "HONE_QUEUES: 'large'"),
    ],
)
def test_a_worker_that_could_not_work_is_refused_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], env: dict[str, str], says: str
) -> None:
    done = hone("worker", *arguments, data=tmp_path, **env)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_queue_setting_that_cannot_be_read_stops_the_api_in_one_line(tmp_path: Path) -> None:
    done = hone("up", "--port", "0", data=tmp_path, HONE_QUEUES="large")
    assert done.returncode == 1
    assert done.stderr.startswith("error: HONE_QUEUES: 'large' is not model=queue")
