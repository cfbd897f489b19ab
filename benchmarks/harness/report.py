"""What every benchmark prints: the host, its figures, and one last line `ratio=<number>`.

Does not cover: what is measured.
"""

from __future__ import annotations

import os
import platform
import signal
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "trl", "peft")


def host() -> str:
    """Processor, cores, memory, accelerator and versions, so that a figure can be read a year later."""
    parts = [_processor(), f"{os.cpu_count()} cores", f"{_memory_gib():.0f} GiB", f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            parts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            parts.append(f"no {name}")
    return ", ".join([*parts, accelerator()])


def accelerator() -> str:
    """The CUDA device's name and memory, or `no GPU`."""
    import torch

    if not torch.cuda.is_available():
        return "no GPU"
    properties = torch.cuda.get_device_properties(0)
    return f"{torch.cuda.device_count()} × {properties.name} ({properties.total_memory / 2**30:.0f} GiB)"


def say(line: str) -> None:
    print(line, flush=True)


def begin(title: str) -> None:
    """Say where it runs. From here on SIGTERM unwinds, so that what was started is stopped."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    say(f"{title}\nhost: {host()}\nload: {os.getloadavg()[0]:.2f} at the start")


def end(ratio: float) -> None:
    """The last line of every benchmark. What is divided by what is in its docstring."""
    say(f"ratio={ratio:.4g}")


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Right-aligned columns, the first one left-aligned."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        padded[0] = row[0].ljust(widths[0])
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
