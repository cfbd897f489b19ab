"""The demo's child processes: each leads its own process group, and none outlives the demo.

Does not cover: what is started and when (`demo`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

STOP_S = 20.0  # `hone up` ends its own children in this time; what is left then is killed


class DemoFailed(Exception):
    """The demo cannot go on; the message says why and what to look at."""


class Child:
    """A process with a name for messages. Its group gets SIGTERM, and SIGKILL if that was not enough."""

    def __init__(
        self, name: str, command: Sequence[str], *, cwd: Path, env: Mapping[str, str], log: Path | None
    ) -> None:
        self.name = name
        self._log = log
        self._said = None if log is None else log.with_suffix(".out")  # apart: last words are not an address
        with contextlib.ExitStack() as files:
            output = None if self._said is None else files.enter_context(self._said.open("wb"))
            errors = None if log is None else files.enter_context(log.open("wb"))
            self._process = subprocess.Popen(
                command,
                cwd=cwd,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,  # Ctrl-C reaches the demo alone, which then ends the groups in order
            )

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    def log_tail(self, lines: int = 15) -> str:
        """The end of what it wrote, what it said on stderr last."""
        assert self._log is not None, "this process writes to the terminal"
        assert self._said is not None
        written = [line for path in (self._said, self._log) for line in path.read_text(errors="replace").splitlines()]
        return "\n".join(written[-lines:])

    def first_line(self, timeout_s: float) -> str:
        """The first line that it writes to stdout; raises DemoFailed when none comes in time."""
        assert self._said is not None, "this process writes to the terminal"
        deadline = time.monotonic() + timeout_s
        while self.returncode is None and time.monotonic() < deadline:
            line, end, _ = self._said.read_text(errors="replace").partition("\n")
            if end:
                return line
            time.sleep(0.05)
        raise DemoFailed(f"{self.name} did not start: {self.log_tail() or 'no output'}")

    def stop(self) -> None:
        """End the whole group; returns when its leader is gone."""
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        self._signal(signal.SIGKILL)
        self._process.wait(STOP_S)

    def _signal(self, number: signal.Signals) -> None:
        # The leader's pid stays the group's id as long as any member lives, and a group that is gone is what we want.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


class Children:
    """Started in order, stopped in reverse order, also when an exception or a signal ends the demo."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        log: Path | None = None,
    ) -> Child:
        """`log` takes stderr, stdout goes to a `.out` beside it; None: both go to the terminal."""
        child = Child(name, command, cwd=cwd, env=env, log=log)
        self._children.append(child)
        return child

    def stop_all(self) -> None:
        while self._children:
            self._children.pop().stop()


@contextlib.contextmanager
def children() -> Iterator[Children]:
    """SIGTERM and SIGHUP become an orderly exit while the block runs."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    started = Children()
    try:
        yield started
    finally:
        for number in (signal.SIGINT, *previous):
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
        try:
            started.stop_all()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.signal(signal.SIGINT, signal.default_int_handler)
