"""On a CUDA device: each GPU benchmark starts, finishes at the tiny shape and names the hardware it ran on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["trainer_tokens", "samples_per_gpu_hour", "two_jobs"])
def test_it_ends_with_a_ratio_and_names_the_device(name: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.gpu.{name}", "--shape", "tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("ratio=")
    assert torch.cuda.get_device_properties(0).name in lines[1]
