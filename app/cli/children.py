"""The processes beside the API: started, logged, restarted with back-off, ended with us.

Does not cover: what they do, and their own children. Each child is on a leash, a pipe that it reads: the kernel
closes it however this process ends, so that nothing outlives `hone up`, even after SIGKILL.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

GRACE_S = 20.0  # the runner gives a supervisor 15 s of these to put its job back
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
SETTLED_S = 60.0  # a child that lived this long starts again at once and cheaply
MAX_LOG_BYTES = 50 * 1024**2


@dataclass(frozen=True)
class Role:
    """One kind of child: its name in messages and logs, its module and what it is told."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()


RUNNER = Role("runner", "workers.local")
KEEPER = Role("keeper", "workers.sampler.keeper")
JANITOR = Role("janitor", "workers.janitor")


def slot(number: int, queue: str, gpus: str | None) -> Role:
    """A worker for one job at a time on `gpus`, "0,1"; None: on all that are visible."""
    arguments = ("--queue", queue) if gpus is None else ("--queue", queue, "--gpus", gpus)
    return Role(f"worker-{number}", "workers.tasks", arguments)


class Stop:
    """Asked once: end in order. Asked twice: now."""

    def __init__(self) -> None:
        self.asked, self.now = asyncio.Event(), asyncio.Event()

    def ask(self) -> None:
        (self.now if self.asked.is_set() else self.asked).set()


async def keep(
    role: Role,
    *,
    environment: Mapping[str, str],
    logs: Path,
    say: Callable[[str], None],
    stop: Stop,
    grace_s: float = GRACE_S,
    first_wait_s: float = FIRST_WAIT_S,
) -> None:
    """Keep one child alive until `stop`; one line to `say` for each death."""
    wait_s, log = first_wait_s, logs / f"{role.name}.log"
    while not stop.asked.is_set():
        began = time.monotonic()
        code = await _run_once(role, environment, log, stop, grace_s)
        if stop.asked.is_set():
            return
        lived = time.monotonic() - began
        if lived >= SETTLED_S:
            wait_s = first_wait_s
        say(f"the {role.name} {_ended(code)} after {lived:.0f} s; starting it again in {wait_s:g} s (log: {log})")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.asked.wait(), wait_s)
        wait_s = min(wait_s * 2, LONGEST_WAIT_S)


async def _run_once(role: Role, environment: Mapping[str, str], log: Path, stop: Stop, grace_s: float) -> int:
    """From start to end, its own or the one we ask for; the exit code."""
    _rotate(log)
    read_end, leash = os.pipe()
    try:
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", role.module, *role.arguments, "--leash-fd", str(read_end),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
                pass_fds=(read_end,),
                start_new_session=True,  # Ctrl-C in the terminal reaches us alone; we tell the children
            )  # fmt: skip
        os.close(read_end)
        read_end = -1
        ended = asyncio.create_task(process.wait())
        asked = asyncio.create_task(stop.asked.wait())
        try:
            await asyncio.wait((ended, asked), return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                await _end(process, stop, grace_s)
            return await ended
        finally:
            asked.cancel()
            if not ended.done():  # we are being cancelled
                _signal_group(process.pid, signal.SIGKILL)
                await ended
    finally:
        for descriptor in (read_end, leash):
            if descriptor >= 0:
                os.close(descriptor)


async def _end(process: asyncio.subprocess.Process, stop: Stop, grace_s: float) -> None:
    """SIGTERM to the child, which ends its own children; SIGKILL to its group when the time is up or nobody waits."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    ended, hurry = asyncio.create_task(process.wait()), asyncio.create_task(stop.now.wait())
    await asyncio.wait((ended, hurry), timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    if not ended.done():
        _signal_group(process.pid, signal.SIGKILL)
    await ended


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _ended(code: int) -> str:
    return f"ended with status {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"


def _rotate(log: Path) -> None:
    """At a start only, and one generation: a child that fails in a loop cannot fill the disk."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
