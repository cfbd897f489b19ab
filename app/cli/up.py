"""`hone up`: migrate, serve the API in this process, keep the runner and the keeper beside it, until told to stop.

Does not cover: several hosts; there the API, the workers and the samplers are started separately.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import uvicorn

from app.cli.children import KEEPER, RUNNER, Stop, keep
from app.cli.failure import FAILED, CommandFailed
from app.cli.installation import prepare_database
from app.core import logging as hone_logging
from app.models.catalogue import Catalogue
from app.security.vault import VaultError
from app.web.main import create_app

if TYPE_CHECKING:
    from app.core.settings import Settings

DRAIN_S = 10  # for requests in flight, long streams included


class _Server(uvicorn.Server):
    """Says when it listens, and leaves the signals alone: `hone up` has children to end as well."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(settings: Settings) -> int:
    """Blocks until SIGINT or SIGTERM. The exit code; raises CommandFailed."""
    settings.root.mkdir(parents=True, exist_ok=True)
    with _only_one(settings), listen(settings) as listener:
        prepare_database(settings)
        hone_logging.configure(settings.log_format, logging.WARNING)
        return asyncio.run(_serve(settings, listener))


async def _serve(settings: Settings, listener: socket.socket) -> int:
    server = _Server(server_config(settings))
    stop = Stop()

    def asked() -> None:
        server.force_exit = stop.asked.is_set()
        stop.ask()
        server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked)
    api = asyncio.create_task(server.serve(sockets=[listener]))
    environment = settings.environment()
    children = [
        asyncio.create_task(keep(role, environment=environment, logs=settings.logs_dir, say=_say, stop=stop))
        for role in (RUNNER, KEEPER)
    ]
    greeting = asyncio.create_task(_greet(server.ready, settings, listener))
    done, _ = await asyncio.wait((api, *children), return_when=asyncio.FIRST_COMPLETED)
    greeting.cancel()
    wanted = stop.asked.is_set()
    if not wanted:  # something broke: end the rest before the exception is shown
        asked()
    _say("stopping; press Ctrl-C again to stop at once")
    await asyncio.gather(api, *children, return_exceptions=True)
    for task in done:
        task.result()
    return 0 if wanted else FAILED


def server_config(settings: Settings) -> uvicorn.Config:
    """The application and how it is served. Raises CommandFailed."""
    try:
        app = create_app(settings)
    except VaultError as error:
        raise CommandFailed(str(error)) from None
    return uvicorn.Config(
        app,
        log_config=None,
        lifespan="on",
        ws="none",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_S,
    )


def listen(settings: Settings) -> socket.socket:
    """The listening socket, bound before anything is started."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CommandFailed(
            f"cannot listen on {settings.host} port {settings.port}: {reason}", fix="hone up --port 0 takes a free port"
        ) from None
    # Inherited by every connection. asyncio sets it only on sockets made with an explicit protocol, unlike this one;
    # without it each answer on a kept connection waits 40 ms for a delayed acknowledgement (44 against 4 ms measured).
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


@contextlib.contextmanager
def _only_one(settings: Settings) -> Iterator[None]:
    """Two `hone up` on one directory would start two keepers; the lock goes with the process, however it ends."""
    path = settings.root / "hone.lock"
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise CommandFailed(
                f"another `hone up` (process {lock.read().strip() or 'unknown'}) uses {settings.root}",
                fix="stop it, or give this one a directory of its own: --data DIR",
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


async def _greet(ready: asyncio.Event, settings: Settings, listener: socket.socket) -> None:
    await ready.wait()
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    models = [model.id for model in Catalogue(settings.models_dir).list()]
    here = f" --data {settings.root}"
    for line in (
        f"Hone is up: http://{shown}:{port}/v1",
        f"  key     hone keys create NAME{here}",
        f"  models  {', '.join(models) if models else f'none yet: hone models pull smollm2-135m-instruct{here}'}",
        f"  data    {settings.root}",
        f"  logs    {settings.logs_dir}",
        "  stop    Ctrl-C; jobs go on at the next start",
    ):
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _say(line: str) -> None:
    sys.stderr.write(f"hone: {line}\n")
    sys.stderr.flush()
