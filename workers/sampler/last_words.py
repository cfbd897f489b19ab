"""Why a sampler ended, in one line: found in what it wrote into its log since it was started.

Does not cover: the log itself; every message names its path.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

READ = 512 * 1024  # of the end of the log; a start that fails writes less
LIMIT = 400  # characters of the answer

# "(EngineCore pid=7) ERROR 11-20 10:49:52 [core.py:1512] " and the built-in engine's "2026-11-20 10:49:52,1 name "
_PREFIX = re.compile(r"^(?:\(\w[^)]*pid=\d+\) )?(?:[A-Z]+ [\d-]+ [\d:]+ \[[^\]]+\] ?)?(?:\d{4}-\d\d-\d\d [\d:,]+ )?")
_FAULT = re.compile(
    r"^(?:[A-Za-z_][\w.]*(?:Error|Exception|Refused|OutOfMemory)|[\w.-]+: error)\b.*: ?.+|.*cannot (?:be served|listen)"
)
# What follows from the fault, or is printed at every end.
_ECHO = re.compile(
    r"EngineDeadError|See root cause|Engine core initialization failed|CancelledError|^(?:nanobind:| - |See https?://)"
    r"|resource_tracker|leaked|warnings\.warn|%\||^\s*[\^~]+$"
)


def size(log: Path) -> int:
    """Where the log of a start begins: its length before."""
    try:
        return log.stat().st_size
    except OSError:
        return 0


def last_words(log: Path, since: int = 0) -> str:
    """The last fault in the log from byte `since` on, else its last line that says anything; with the log's path."""
    try:
        with log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(since, end - READ))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"no log ({error.strerror}: {log})"
    lines = [_PREFIX.sub("", line, count=1).strip() for line in re.split(r"[\r\n]+", text)]
    said = [line for line in lines if line and _ECHO.search(line) is None]
    faults = [at for at, line in enumerate(said) if _FAULT.match(line)]
    words = said[faults[-1]] if faults else (said or ["it wrote nothing"])[-1]
    if "validation error" in words:  # pydantic says what is wrong in the lines below
        words = " ".join(said[faults[-1] : faults[-1] + 3])
    return f"{words[:LIMIT]} (log: {log})"
