"""How a command fails: one line that says what, one that says what to do, and an exit code.

Does not cover: wrong usage, which typer reports with exit code 2.

    0  done
    1  the command could not do what was asked
    2  wrong usage or an unreadable setting
    3  a check found something that blocks (`hone doctor`)
    4  the service or a peer could not be reached
    130  interrupted
"""

from __future__ import annotations

FAILED, USAGE, BLOCKED, UNREACHABLE, INTERRUPTED = 1, 2, 3, 4, 130


class CommandFailed(Exception):
    """Shown as `error: …` and `fix: …` on standard error; `code` is the exit code."""

    def __init__(self, message: str, *, fix: str | None = None, code: int = FAILED) -> None:
        super().__init__(message)
        self.message, self.fix, self.code = message, fix, code
