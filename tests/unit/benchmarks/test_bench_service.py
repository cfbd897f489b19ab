"""The service benchmark's arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks.bench_service import quantile
from benchmarks.harness.processes import cpu_seconds


def test_a_quantile_is_a_value_that_was_measured() -> None:
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [quantile(values, share) for share in (0.5, 0.8, 0.81, 0.99, 1.0)] == [3.0, 4.0, 5.0, 5.0, 5.0]
    assert quantile([7.0], 0.5) == 7.0


def test_the_cpu_time_of_a_process_includes_that_of_its_children_dead_or_alive() -> None:
    before = cpu_seconds(os.getpid())
    burn = "import time\nwhile time.process_time() < 0.2: pass\n"
    subprocess.run([sys.executable, "-c", burn], check=True, timeout=60)
    assert cpu_seconds(os.getpid()) - before >= 0.15
    wait = f"{burn}print(flush=True); import sys; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", wait], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert cpu_seconds(os.getpid()) - before >= 0.35
