"""The processes of a group, or of a data directory: what is left of a server and its children.

Does not cover: groups on anything but Linux.
"""

from __future__ import annotations

import time
from pathlib import Path


def of_data(data: Path) -> list[str]:
    """Processes of any age whose environment names this data directory."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if f"HONE_DATA_DIR={data}".encode() in (directory / "environ").read_bytes():
                found.append((directory / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def family(leader: int) -> dict[int, str]:
    """Processes of the group that `leader` leads and that are not dead, with their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if int(fields[2]) == leader and fields[0] != "Z":
            found[int(entry.name)] = line
    return found


def gone(leader: int, within_s: float = 15.0) -> bool:
    """Is the whole group gone, now or soon? Blocks."""
    deadline = time.monotonic() + within_s
    while family(leader) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not family(leader)
