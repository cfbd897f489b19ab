"""The supervisor's end of the pipe to the trainer: start it, ask for a step, notice when it dies or falls silent.

Does not cover: the trainer itself (`workers.trainer`), nor what a step's answer means for the job.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from workers import messages
from workers.messages import Failed, Progress, ProtocolError, Ready, Start, Step, StepDone, Stop
from workers.process import FD, Child, kill_group, log_tail, spawn


class TrainerDied(Exception):
    """The trainer's process ended, or reported an error. `detail` is for the log, the message for the event."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class TrainerSilent(TrainerDied):
    """No message within the limit: hung. Its process group was killed."""


async def _nothing(pid: int) -> None:
    pass


class TrainerLink:
    """One trainer process. Not for concurrent use: one request at a time."""

    def __init__(
        self,
        *,
        log: Path,
        environment: Mapping[str, str],
        silence_s: float,
        command: Sequence[str] = (sys.executable, "-m", "workers.trainer"),
    ) -> None:
        self._command = command
        self._log = log
        self._environment = environment
        self._silence_s = silence_s
        self._child: Child | None = None
        self._reader: asyncio.StreamReader | None = None
        self._transport: asyncio.BaseTransport | None = None
        self.on_progress: Callable[[Progress], None] = lambda progress: None
        self.on_spawned: Callable[[int], Awaitable[None]] = _nothing  # its id, before it is told anything

    def use(self, environment: Mapping[str, str]) -> None:
        """Add to the environment of the process, before it is started: which devices it may see."""
        self._environment = {**self._environment, **environment}

    @property
    def pid(self) -> int | None:
        """Leader of the trainer's process group."""
        return self._child.pid if self._child else None

    async def start(self, message: Start) -> Ready:
        """Spawn the process and wait until version 0 (or the snapshot's) is published. Raises `TrainerDied`."""
        answer_read, answer_write = os.pipe()
        os.set_inheritable(answer_write, True)
        # The commands' pipe is the leash: its end-of-file makes the trainer kill its own group.
        self._child = await asyncio.to_thread(self._spawn, answer_write)
        os.close(answer_write)
        await self.on_spawned(self._child.pid)
        loop = asyncio.get_running_loop()
        self._reader = asyncio.StreamReader(limit=messages.MAX_LINE_BYTES * 2)
        protocol = asyncio.StreamReaderProtocol(self._reader)
        self._transport, _ = await loop.connect_read_pipe(lambda: protocol, os.fdopen(answer_read, "rb", 0))
        await self._send(message)
        answer = await self._receive()
        if not isinstance(answer, Ready):
            raise TrainerDied(f"the trainer answered {type(answer).__name__} to Start")
        return answer

    def _spawn(self, answer_write: int) -> Child:
        return spawn(
            [*self._command, "--out-fd", str(answer_write)],
            log=self._log,
            environment=self._environment,
            leash=("--in-fd", FD),
            pass_fds=(answer_write,),
        )

    async def step(self, message: Step) -> StepDone:
        """One optimizer step. Raises `TrainerDied`."""
        await self._send(message)
        answer = await self._receive()
        if not isinstance(answer, StepDone) or answer.step != message.step:
            raise TrainerDied(f"the trainer answered {type(answer).__name__} to step {message.step}")
        return answer

    async def stop(self, grace_s: float = 10.0) -> None:
        """Ask it to exit, wait, then kill the group; safe to call in any state."""
        if self._child is None:
            return
        with contextlib.suppress(TrainerDied):
            await self._send(Stop())
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._child.process.wait, grace_s)
        self.kill()

    def kill_group(self) -> None:
        """SIGKILL to the whole group and nothing else: the one call that another thread may make."""
        if self._child is not None:
            kill_group(self._child.pid)

    def kill(self) -> None:
        """SIGKILL to the whole group, reap, close the pipes."""
        if self._child is not None:
            self._child.kill()
        if self._transport is not None:
            self._transport.close()

    async def _send(self, message: messages.Message) -> None:
        assert self._child is not None
        line = messages.encode(message)
        try:
            # At most 64 KiB and the trainer always reads: a pipe's buffer takes it, but a hung reader must not hang us.
            await asyncio.wait_for(asyncio.to_thread(os.write, self._child.leash, line), timeout=30.0)
        except (OSError, TimeoutError) as error:
            raise self._died() from error

    async def _receive(self) -> messages.Message:
        assert self._reader is not None
        while True:
            try:
                line = await asyncio.wait_for(self._reader.readline(), timeout=self._silence_s)
            except TimeoutError as error:
                self.kill()
                raise TrainerSilent(
                    f"the trainer reported nothing for {self._silence_s:.0f} s", log_tail(self._log)
                ) from error
            except ValueError as error:  # no newline within the reader's limit
                raise self._babbled(error) from error
            if not line:
                raise self._died()
            try:
                message = messages.decode(line)
            except ProtocolError as error:
                raise self._babbled(error) from error
            if isinstance(message, Progress):
                self.on_progress(message)
            elif isinstance(message, Failed):
                raise TrainerDied(f"the trainer failed: {message.error}: {message.message}", message.traceback)
            else:
                return message

    def _babbled(self, error: Exception) -> TrainerDied:
        self.kill()
        return TrainerDied(f"the trainer wrote something that is not a message: {error}", log_tail(self._log))

    def _died(self) -> TrainerDied:
        assert self._child is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.process.wait(timeout=2)
        code = self._child.poll()
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return TrainerDied(f"the trainer's process ended ({how})", log_tail(self._log))
