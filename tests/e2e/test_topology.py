"""PostgreSQL, Redis, API, workers and a sampler as plain processes: they end together, and no job is lost meanwhile."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from deploy.local.processes import running
from deploy.local.prove import prove

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

START_S, END_S = 90.0, 40.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not below pytest's: that is closed to the user that root's PostgreSQL runs as."""
    with TemporaryDirectory(prefix="hone-topology-") as made:
        Path(made).chmod(0o711)
        yield Path(made)


def test_no_job_is_lost_with_a_worker_a_celery_process_and_all_that_redis_held(
    taught_models: Path, folder: Path
) -> None:
    try:
        figures = prove(taught_models, folder / "data", 4, deadline_s=300)
    except BaseException:
        for log in sorted((folder / "data" / "logs").rglob("*.log")):
            sys.stderr.write(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}\n")
        raise
    sys.stderr.write(f"{figures}\n")
    assert figures.kills == 2
    assert figures.sum.resumed >= 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=str)
def test_however_it_ends_nothing_of_it_runs_on(folder: Path, number: signal.Signals) -> None:
    data = folder / "data"
    command = [sys.executable, "-m", "deploy.local", "up", "--data", str(data), "--port", "0", "--workers", "1"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HONE_")}
    with subprocess.Popen(command, env=kept, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert re.fullmatch(r"Hone is up: http://127\.0\.0\.1:\d+/v1\n", first)
        assert len(running(data)) > 5
        servers = [int((data / "postgres" / "postmaster.pid").read_text().split("\n", 1)[0])]
        process.send_signal(number)
        assert process.wait(END_S) == (0 if number is signal.SIGTERM else -number)
    deadline = time.monotonic() + END_S
    while (left := running(data)) or any(Path(f"/proc/{pid}").exists() for pid in servers):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
