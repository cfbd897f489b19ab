"""How fast this host multiplies matrices, and what that means for the length of the demo.

Does not cover: the rest of the host (`doctor`). The probe is a process of its own: the command line never loads torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

SLOW_GFLOPS = 200.0
PROBE_TIMEOUT_S = 120.0
# One linear layer of a small model on 256 rows, a second in each type.
PROBE = """
import json, time, torch
from torch.nn.functional import linear
rates = {}
for dtype in (torch.bfloat16, torch.float32):
    x, w = torch.randn(256, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    linear(x, w)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < 1.0:
        linear(x, w)
        count += 1
    rates[str(dtype).removeprefix("torch.")] = count * 2 * 256 * 1024 * 1024 / (time.perf_counter() - begun) / 1e9
print(json.dumps(rates))
"""
# Measured: an idle 2-core EPYC with avx512_bf16 has this rate and takes 4.4 minutes.
REFERENCE_GFLOPS = 435.0
REFERENCE_MINUTES = 5.0


class NoTorch(Exception):
    """The training extra is not installed."""


@dataclass(frozen=True)
class Speed:
    """`gflops` of the faster type, which is the one that sampler and trainer choose."""

    gflops: float
    dtype: str

    @property
    def minutes(self) -> int:
        """Rough: everything but the tools scales with this rate."""
        return max(1, round(REFERENCE_MINUTES * REFERENCE_GFLOPS / min(self.gflops, REFERENCE_GFLOPS)))


def measure() -> Speed:
    """Takes about four seconds. Raises NoTorch."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise NoTorch(f"{reason[0]}; the demo trains: install the extra `hone-rft[train]`")
    rates: dict[str, float] = json.loads(done.stdout)
    dtype = max(rates, key=lambda name: rates[name])
    return Speed(rates[dtype], dtype)
