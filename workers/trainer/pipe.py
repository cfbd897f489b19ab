"""The trainer's end of the pipe: a thread that always reads, so that end-of-file is noticed in the middle of an update.

Does not cover: the messages (`workers.messages`), the supervisor's end (`workers.process`).

End-of-file means the supervisor is gone and its lease will be taken over; the whole process group (ranks, data loaders)
ends at once with SIGKILL. The supervisor starts the trainer in a session of its own, so nobody else is in the group.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable

from workers.leash import kill_own_group
from workers.messages import MAX_LINE_BYTES, Message, ProtocolError, Stop, decode, encode


class Pipe:
    """Reads from `in_fd` in a daemon thread, writes to `out_fd` from any thread."""

    def __init__(self, in_fd: int, out_fd: int, on_end: Callable[[], None] = kill_own_group) -> None:
        self._in_fd, self._out_fd, self._on_end = in_fd, out_fd, on_end
        self._messages: queue.Queue[Message | ProtocolError] = queue.Queue()
        self._write_lock = threading.Lock()
        os.set_inheritable(in_fd, False)
        os.set_inheritable(out_fd, False)
        threading.Thread(target=self._read, name="pipe", daemon=True).start()

    def receive(self) -> Message:
        """The next message; blocks as long as the supervisor lives. Raises `ProtocolError`."""
        message = self._messages.get()
        if isinstance(message, ProtocolError):
            raise message
        return message

    def send(self, message: Message) -> None:
        """Write one line. A closed pipe is the same as end-of-file."""
        line = encode(message)
        try:
            with self._write_lock:
                while line:
                    line = line[os.write(self._out_fd, line) :]
        except BrokenPipeError:
            self._on_end()

    def _read(self) -> None:
        with os.fdopen(self._in_fd, "rb") as lines:
            while line := lines.readline(MAX_LINE_BYTES + 1):
                try:
                    message = decode(line)
                except ProtocolError as error:
                    self._messages.put(error)
                    continue
                self._messages.put(message)
                if isinstance(message, Stop):
                    return  # the supervisor may close its end now; we leave by ourselves
        self._on_end()
