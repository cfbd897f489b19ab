"""`python -m deploy.local up`: PostgreSQL, Redis, the API, workers and samplers on this machine, until Ctrl-C.

Does not cover: what they are (`topology`), and the proof that they lose nothing (`python -m deploy.local.prove`).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from app.cli.failure import FAILED, INTERRUPTED, CommandFailed
from deploy.local.program import LOOK_S
from deploy.local.topology import Options, Topology


def say(line: str) -> None:
    sys.stderr.write(f"local: {line}\n")
    sys.stderr.flush()


def leave(number: int, frame: FrameType | None) -> None:
    """SIGTERM and SIGHUP end the same way as Ctrl-C: out of the context manager, in order."""
    raise SystemExit(0)


def up(options: Options) -> int:
    """Blocks. The exit code; raises CommandFailed."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    with Topology(options, say) as topology:
        greet(topology)
        try:
            while True:
                topology.look()
                time.sleep(LOOK_S)
        except KeyboardInterrupt:
            return 0
        finally:
            say("stopping; press Ctrl-C again to stop at once")


def greet(topology: Topology) -> None:
    for line in (
        f"Hone is up: {topology.base_url}",
        f"  key     {topology.key()}",
        f"  shell   . {topology.folder / 'env.sh'}    then: hone models pull smollm2-135m-instruct, hone doctor, …",
        f"  data    {topology.folder}",
        f"  logs    {topology.logs}",
        "  stop    Ctrl-C; jobs go on at the next start",
    ):
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("up", help="start everything and stay")
    command.add_argument("--data", type=Path, default=Path("data-local"), help="folder of everything (%(default)s)")
    command.add_argument(
        "--port", type=int, default=int(os.environ.get("HONE_PORT", "8000")), help="of the API; 0: any (%(default)s)"
    )
    command.add_argument("--workers", type=int, default=2, help="`hone worker` processes (%(default)s)")
    options = parser.parse_args()
    try:
        return up(Options(options.data, options.port, options.workers))
    except CommandFailed as failed:
        sys.stderr.write(f"error: {failed.message}\n" + (f"fix:   {failed.fix}\n" if failed.fix else ""))
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
