"""Which process a process id means: ids are given out again, so a process is known by its id and its start time.

Does not cover: what is recorded of processes (`workers.presence`), who ends what is left (`workers.leftovers`). Reads
Linux's /proc; where there is none nothing can be told, and nothing is ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MARK = "HONE_WORKER"  # in the environment of a trainer's processes: the row of the worker that started them
GONE_S = 5.0  # for killed processes to leave: a driver takes its time to free a GPU's memory
PROC = Path("/proc")


@dataclass(frozen=True)
class Seen:
    """A process as /proc shows it. `started`: clock ticks between the boot and its start (field 22 of its stat)."""

    group: int
    started: int
    dead: bool  # only its parent has not heard of it yet


class Undead(Exception):
    """SIGKILL does not end these processes: they hang in the kernel, or belong to another user."""

    def __init__(self, pids: Sequence[int]) -> None:
        super().__init__(f"processes {', '.join(map(str, pids))} do not end")


def place() -> str:
    """Boot and pid namespace: within one, an id and a start time name one process. "" where that cannot be told."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{(PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return ""


def look(pid: int) -> Seen | None:
    """None: there is no such process."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # its name, which may hold anything, is in brackets
    return Seen(group=int(fields[2]), started=int(fields[19]), dead=fields[0] in "ZX")


def is_alive(pid: int, started: int) -> bool:
    """Is it still that process, and not only its id?"""
    seen = look(pid)
    return seen is not None and seen.started == started and not seen.dead


def end_group(leader: int, started: int, mark: str) -> bool:
    """SIGKILL to what is left of the group of that process, until it is gone. Blocking. True: something was left.

    A leader that is gone may have left its number to another group: then only those are ended who bear `mark` as
    `MARK`. Raises `Undead` after `GONE_S`.
    """
    deadline, found = time.monotonic() + GONE_S, False
    while pids := _left(leader, started, mark):
        if time.monotonic() > deadline:
            raise Undead(pids)
        found = True
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return found


def _left(leader: int, started: int, mark: str) -> list[int]:
    members, seen = _members(leader), look(leader)
    if seen is not None and seen.started == started:
        return members
    return [pid for pid in members if _bears(pid, mark)]


def _members(group: int) -> list[int]:
    numbers = (int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal())
    return [pid for pid in numbers if (seen := look(pid)) is not None and seen.group == group and not seen.dead]


def _bears(pid: int, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:  # gone, or another user's: not ours
        return False
