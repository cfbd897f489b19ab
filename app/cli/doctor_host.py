"""What `hone doctor` says of the machine: Python and its packages, processor, GPU, memory.

Does not cover: disks (`doctor_storage`) and what samplers make of the GPUs (`doctor_sampler`).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from app.cli import demo_probe
from app.cli.findings import DEADLINE_S, Finding, Verdict

if TYPE_CHECKING:
    from app.core.settings import Settings

GIB = 1024**3
LOW_MEMORY = 4 * GIB
TRAIN = ("torch", "transformers", "trl", "peft", "accelerate")
PCI = Path("/sys/bus/pci/devices")
NVIDIA, DISPLAY = "0x10de", "0x03"  # vendor; first digits of the class of everything that computes or draws


def python(settings: Settings) -> Iterator[Finding]:
    yield Finding("python", Verdict.OK, f"{platform.python_version()} in {sys.prefix}")
    absent = [name for name in TRAIN if importlib.util.find_spec(name) is None]
    if absent:
        yield Finding("training", Verdict.PROBLEM, f"missing: {', '.join(absent)}", "pip install 'hone-rft[train]'")
    else:
        yield Finding("training", Verdict.OK, ", ".join(f"{name} {_version(name)}" for name in TRAIN))


def processor(settings: Settings) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    bf16 = sorted({"avx512_bf16", "amx_bf16"} & _cpu_flags())
    yield Finding("cores", Verdict.OK, f"{cores}, {settings.cpu_threads} used; bf16: {', '.join(bf16) or 'emulated'}")
    gpus = _gpus()
    yield _gpu(gpus)
    try:
        speed = demo_probe.measure()
    except (demo_probe.NoTorch, subprocess.TimeoutExpired) as error:
        yield Finding("matrices", Verdict.WARNING, f"not measured: {error}")
        return
    slow = speed.gflops < demo_probe.SLOW_GFLOPS and not gpus
    yield Finding(
        "matrices",
        Verdict.WARNING if slow else Verdict.OK,
        f"{speed.gflops:.0f} GFLOPS in {speed.dtype}; the demo takes about {speed.minutes} min",
        "stop other work on this host, or use one with more cores" if slow else None,
    )


def memory(settings: Settings) -> Iterator[Finding]:
    free = _free_memory()
    if free is None:
        yield Finding("memory", Verdict.WARNING, "unknown on this system")
    elif free < LOW_MEMORY:
        yield Finding("memory", Verdict.WARNING, f"{free / GIB:.1f} GB free", "close programs: the demo needs 4 GB")
    else:
        yield Finding("memory", Verdict.OK, f"{free / GIB:.1f} GB free")


def _gpu(found: list[str]) -> Finding:
    if found and _version("torch").endswith("+cpu"):
        detail = f"{'; '.join(found)}: not used for training, torch {_version('torch')} is a build for the CPU"
        return Finding("gpu", Verdict.WARNING, detail, "pip install --force-reinstall torch, from its CUDA index")
    if found:
        return Finding("gpu", Verdict.OK, "; ".join(found))
    cpu = "jobs sample on the built-in engine and train on the CPU: right for the demo and small models"
    if _nvidia_cards():
        detail = f"an NVIDIA card is there, but nvidia-smi does not answer; {cpu}"
        fix = "install NVIDIA's driver; in a container, start it with --gpus all (nvidia-container-toolkit)"
        return Finding("gpu", Verdict.WARNING, detail, fix)
    fix = "for larger ones an NVIDIA card with its driver and CUDA's torch; then vLLM: deploy/vllm/README.md"
    return Finding("gpu", Verdict.WARNING, f"none: {cpu}", fix)


def _nvidia_cards() -> bool:
    """By the bus: what is built in, whether a driver knows it or not."""
    try:
        for device in PCI.iterdir():
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
            if vendor == NVIDIA and kind.startswith(DISPLAY):
                return True
    except OSError:
        return False
    return False


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "?"


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return set(line.partition(":")[2].split())


def _free_memory() -> int | None:
    """Bytes that a new process may take: what the kernel says, cut by the container's limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    except subprocess.TimeoutExpired:
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
