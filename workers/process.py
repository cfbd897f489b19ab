"""Child processes in their own session, on a leash, with a log file; and the end of a whole process group.

Does not cover: what is said over a pipe (`workers.messages`, `workers.trainer_link`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

OURS = ("SECRET_KEY", "DATABASE_URL", "REDIS_URL", "STORAGE_URL", "STORAGE_OPTIONS")
SECRETS = frozenset(f"HONE_{name}{suffix}" for name in OURS for suffix in ("", "_FILE")) | {
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
}
FD = "{leash}"  # stands for the leash's descriptor in a command line


@dataclass
class Child:
    """A child that leads its own process group; closing `leash` (or dying) tells it that its parent is gone."""

    process: subprocess.Popen[bytes]
    leash: int  # our write end

    @property
    def pid(self) -> int:
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.poll()

    def terminate(self) -> None:
        """SIGTERM to the child alone: it ends its own children in order."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the whole group, then reap."""
        kill_group(self.pid)
        self.process.wait()
        self.drop_leash()

    def drop_leash(self) -> None:
        if self.leash >= 0:
            os.close(self.leash)
            self.leash = -1

    def stop(self, grace_s: float) -> int:
        """SIGTERM, wait up to `grace_s`, then kill the group. Blocking. Returns the exit code."""
        self.terminate()
        deadline = time.monotonic() + grace_s
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill()
        return self.process.returncode


def spawn(
    command: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str],
    leash: Sequence[str] = ("--leash-fd", FD),
    pass_fds: Sequence[int] = (),
    trusted: bool = False,
) -> Child:
    """Start `command` + `leash` in its own session, output appended to `log`; `FD` is the leash's read end.

    Only a `trusted` process gets our secrets: neither trainer nor sampler has a use for the database or its key.
    """
    read_end, write_end = os.pipe()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(read_end) if part == FD else part for part in (*command, *leash)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(environment, trusted),
            pass_fds=(read_end, *pass_fds),
            start_new_session=True,
        )
    os.close(read_end)
    return Child(process, write_end)


def _environment(added: Mapping[str, str], trusted: bool) -> dict[str, str]:
    found = {**os.environ, **added}
    return found if trusted else {name: value for name, value in found.items() if name not in SECRETS}


def spawn_on_leash(command: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> Child:
    """For programs that know nothing of leashes (a sampler): `workers.leash` runs them and ends them with us."""
    held = [sys.executable, "-m", "workers.leash", "--fd", FD, "--", *command]
    return spawn(held, log=log, environment=environment, leash=())


def kill_group(pid: int) -> None:
    """SIGKILL to the group that `pid` leads; a group that is gone is fine."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def log_tail(path: Path, limit: int = 2000) -> str:
    """The last characters of a log, for an event or an error."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - limit))
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""
