"""The processes of one installation, found by what their environment says: its folder, and the host they work as.

Does not cover: processes of other users (when not root), and systems without /proc.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

KILL_S = 5.0


def running(folder: Path, *needles: str, host: str | None = None) -> dict[int, str]:
    """Id and command line of each whose HONE_DATA_DIR is `folder` and whose command line holds all `needles`."""
    marks = [f"HONE_DATA_DIR={folder}".encode()]
    if host is not None:
        marks.append(f"HONE_HOSTNAME={host}".encode())
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # gone meanwhile, or of another user
            continue
        if all(mark in environment for mark in marks) and all(needle in line for needle in needles):
            found[int(entry.name)] = line
    return dict(sorted(found.items()))


def kill_all(folder: Path, *, host: str) -> int:
    """kill -9 to everything of a host at once, also what it starts meanwhile; how many there were."""
    killed: set[int] = set()
    deadline = time.monotonic() + KILL_S
    while (left := running(folder, host=host)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= set(left)
    return len(killed)


def left_of(pids: Iterable[int], within_s: float) -> list[int]:
    """Those of `pids` that still run after at most `within_s`. Blocks. A zombie does not run."""
    deadline = time.monotonic() + within_s
    while (left := [pid for pid in pids if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
