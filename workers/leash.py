"""Nothing outlives its parent: a pipe whose end-of-file means that the parent is gone, however it went.

Does not cover: what a process does then; it passes a callback. Run as a program it holds any command on such a leash:
`python -m workers.leash --fd N -- COMMAND …` (how the keeper runs a sampler). Standard library only.

A parent-death signal is not used: it would kill this process before it can kill its group (control plane §3.5).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable


def watch(descriptor: int, on_eof: Callable[[], object]) -> threading.Thread:
    """Call `on_eof` from a daemon thread once the other end of `descriptor` is closed."""

    def wait() -> None:
        while True:
            try:
                if os.read(descriptor, 4096) == b"":
                    break
            except OSError:
                break
        on_eof()

    thread = threading.Thread(target=wait, name="leash", daemon=True)
    thread.start()
    return thread


def kill_own_group() -> None:
    """SIGKILL to this process's whole group, itself included."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="workers.leash")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    child = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    signal.signal(signal.SIGINT, lambda *_: child.terminate())
    watch(options.fd, kill_own_group)
    return child.wait()


if __name__ == "__main__":
    sys.exit(main())
