"""One process of the topology: started on a leash, waited for until it is healthy, started again when it dies, ended.

Does not cover: which processes there are (`topology`). The leash is a pipe (`workers.leash`): however we end, SIGKILL
included, the kernel closes it, and nothing stays behind.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from app.cli.failure import CommandFailed
from workers.process import FD, Child, log_tail, spawn

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
SETTLED_S = 60.0  # a process that lived this long starts again cheaply
LOOK_S = 0.2
GONE_S = 2.0  # between SIGKILL and the moment when a port or a lock file is free again


class TopologyFailed(CommandFailed):
    """It cannot be brought up."""


@dataclass(frozen=True)
class Program:
    """What is run. `missing`: what keeps it from being healthy, in words; None: nothing.

    `ask`: how it is asked to end, where SIGTERM is not the way. Only `trusted` ones get our secrets.
    """

    name: str
    command: tuple[str, ...]
    missing: Callable[[], str | None]
    environment: Mapping[str, str] = field(default_factory=dict)
    start_s: float = 60.0
    stop_s: float = 10.0
    ask: Callable[[], None] | None = None
    trusted: bool = True


class Kept:
    """A program that is kept alive from `start` to `stop`. Nothing here waits, except where it says so."""

    def __init__(self, program: Program, log: Path, say: Callable[[str], None]) -> None:
        self.program, self.log = program, log
        self._say = say
        self._child: Child | None = None
        self._began = 0.0
        self._wait_s = FIRST_WAIT_S
        self._again_at: float | None = None  # monotonic; it is dead until then

    @property
    def alive(self) -> bool:
        return self._child is not None and self._child.poll() is None

    @property
    def group(self) -> int:
        """Its process group, while it is started."""
        assert self._child is not None
        return self._child.pid

    def start(self) -> None:
        command = (sys.executable, "-m", "workers.leash", "--fd", FD, "--", *self.program.command)
        self._child = spawn(
            command, log=self.log, environment=self.program.environment, leash=(), trusted=self.program.trusted
        )
        self._began, self._again_at = time.monotonic(), None

    def await_health(self) -> None:
        """Blocks. Raises TopologyFailed when it ends, or is not healthy within its time."""
        deadline = time.monotonic() + self.program.start_s
        while (missing := self.program.missing()) is not None:
            if not self.alive:
                raise self._failed("ended at its start")
            if time.monotonic() >= deadline:
                raise self._failed(f"is not healthy after {self.program.start_s:g} s ({missing})")
            time.sleep(LOOK_S)

    def look(self) -> None:
        """Start it again if it is dead and its pause is over; one line for each death."""
        moment = time.monotonic()
        if self._child is None:
            if self._again_at is not None and moment >= self._again_at:
                self.start()
        elif not self.alive:
            lived = moment - self._began
            if lived >= SETTLED_S:
                self._wait_s = FIRST_WAIT_S
            name, log = self.program.name, self.log
            self._say(f"{name} ended after {lived:.0f} s; it starts again in {self._wait_s:g} s (log: {log})")
            self.kill()  # what it may have left of its group
            self._again_at = moment + self._wait_s
            self._wait_s = min(self._wait_s * 2, LONGEST_WAIT_S)

    def kill(self) -> None:
        """SIGKILL to its whole group, as in a power cut. Blocks until it is gone; it stays dead until `start`."""
        if self._child is not None:
            self._child.kill()
            deadline = time.monotonic() + GONE_S
            while _is_there(self._child.pid) and time.monotonic() < deadline:
                time.sleep(0.01)
        self._child = self._again_at = None

    def ask_to_end(self) -> None:
        if self._child is None or not self.alive:
            return
        if self.program.ask is not None:
            self.program.ask()
        else:
            self._child.terminate()  # the leash passes it on

    def await_end(self) -> None:
        """Blocks for as long as the program may take; then its group is killed. It is not started again."""
        deadline = time.monotonic() + self.program.stop_s
        while self.alive and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        if self.alive:
            self._say(f"{self.program.name} did not end within {self.program.stop_s:g} s and is killed")
        self.kill()

    def _failed(self, what: str) -> TopologyFailed:
        return TopologyFailed(f"{self.program.name} {what}:\n{log_tail(self.log)}", fix=f"see {self.log}")


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
