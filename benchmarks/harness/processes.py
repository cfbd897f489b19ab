"""Processes that a benchmark starts: a free port, the first line of a server, an end that leaves nothing behind.

Does not cover: what they are.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
END_S = 40.0


class DidNotStart(Exception):
    """A process ended or stayed silent instead of becoming ready."""


@contextmanager
def process(
    arguments: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None, first_line: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """`python ARGUMENTS` in a process group of its own, ended with us. With `first_line`, stdout is a pipe."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if first_line else output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield child
    finally:
        stop(child)


def stop(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL to the whole group."""
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(END_S)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def read_line(stream: IO[bytes] | None, timeout_s: float) -> str:
    """The first line a server prints. Raises DidNotStart."""
    assert stream is not None
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        if not selector.select(timeout_s):
            raise DidNotStart(f"nothing was printed within {timeout_s:g} s")
    line = stream.readline().decode().strip()
    if not line:
        raise DidNotStart("the process ended without a line; see its log")
    return line


@contextmanager
def tool_server(mean_s: float, p99_s: float, log: Path) -> Iterator[str]:
    """The address of a running `benchmarks.harness.tool_server`."""
    arguments = ["-m", "benchmarks.harness.tool_server", "--mean", str(mean_s), "--p99", str(p99_s)]
    with process(arguments, log=log, first_line=True) as child:
        yield read_line(child.stdout, 60.0)


def resident_mib(pid: int) -> float:
    """Resident memory of one process; 0 when it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
    return 0.0


def cpu_seconds(pid: int) -> float:
    """That a process and its descendants have used, those that ended included."""
    used: dict[int, float] = {}
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
                used[int(entry.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return sum(used.get(member, 0.0) for member in family)


def running(needle: str, environment: str) -> list[int]:
    """Ids of the processes with `needle` in their command line and `environment` (NAME=value) in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if needle in line and environment.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return sorted(found)


def wait_until(condition: object, timeout_s: float, what: str) -> None:
    """Poll `condition()` until it is true. Raises DidNotStart."""
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise DidNotStart(f"{what} was not there within {timeout_s:g} s")
        time.sleep(0.1)
