"""Which processes make the service, in which order they start, how each is known to be healthy, and their common end.

Does not cover: the command line (`__main__`). Everything of one installation is in one folder, which is also
HONE_DATA_DIR: the cluster of PostgreSQL, Redis' file, models, jobs, and the log of every process.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from app.cli import alive
from app.cli.installation import load_settings
from deploy.local.ports import HOST, free_port, taken
from deploy.local.postgres import Postgres
from deploy.local.program import Kept, Program, TopologyFailed
from deploy.local.redis_server import RedisServer

HONE = (sys.executable, "-m", "app.cli.main")
STOP_S = 30.0  # `hone worker` gives its children 20 s of these
KEY_S = 60.0


@dataclass(frozen=True)
class Options:
    """`port`: of the API; 0: a free one. `environment`: settings for every Hone process, on top of our own environment.

    With HONE_DATABASE_URL or HONE_REDIS_URL set, no server is started for it.
    """

    folder: Path
    port: int = 8000
    workers: int = 2
    environment: Mapping[str, str] = field(default_factory=dict)


class Topology:
    """Context manager: up inside, and nothing of it runs afterwards. Call `look` every moment inside."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self.options, self.say = options, say
        self.given = load_settings(None)  # raises CommandFailed
        self.folder = options.folder.expanduser().resolve()
        self.logs = self.folder / "logs"
        self.port = options.port or free_port()
        self.kept: dict[str, Kept] = {}
        self.environment: dict[str, str] = {}
        self.stores: list[Postgres | RedisServer] = []  # those of our own
        self.redis: RedisServer | None = None
        self._stages: list[list[Kept]] = []  # in the order of their start; ended in reverse
        self._lock: int | None = None

    @property
    def base_url(self) -> str:
        return f"http://{HOST}:{self.port}/v1"

    @property
    def workers(self) -> Sequence[str]:
        """Their names: of the processes, and of the hosts that they take themselves for."""
        return [f"worker-{number}" for number in range(1, self.options.workers + 1)]

    def __enter__(self) -> Topology:
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for stage in reversed(self._stages):
                for kept in stage:
                    kept.ask_to_end()
                for kept in stage:
                    kept.await_end()
        finally:  # an interruption of the end: now
            for stage in reversed(self._stages):
                for kept in stage:
                    kept.kill()
            if self._lock is not None:
                os.close(self._lock)

    def look(self) -> None:
        """Start again what has died, each after its own pause."""
        for kept in self.kept.values():
            kept.look()

    def start(self, programs: Sequence[Program]) -> None:
        """Start one stage side by side, and wait until all of it is healthy. Raises TopologyFailed."""
        stage = [Kept(program, self.logs / f"{program.name}.log", self.say) for program in programs]
        self._stages.append(stage)
        for kept in stage:
            kept.start()
        for kept in stage:
            kept.await_health()
            self.kept[kept.program.name] = kept
            self.say(f"{kept.program.name} is healthy")

    def hone(self, name: str, *arguments: str, missing: Callable[[], str | None], start_s: float = 90.0) -> Program:
        """A Hone process that takes itself for the host `name`: as if each had a machine."""
        environment = {**self.environment, "HONE_HOSTNAME": name}
        return Program(name, (*HONE, *arguments), missing, environment, start_s=start_s, stop_s=STOP_S)

    def key(self) -> str:
        """An API key that this service takes; made once, and kept beside the other secrets of the folder."""
        path = self.folder / "api.key"
        if path.exists() and self._accepts(path.read_text()):
            return path.read_text()
        done = subprocess.run(
            [*HONE, "keys", "create", "local"], env={**os.environ, **self.environment}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=KEY_S, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise TopologyFailed(f"no API key could be made: {done.stderr.strip()}")
        _write_secret(path, done.stdout.strip())
        return done.stdout.strip()

    def _start(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        self._lock = self._only_one()
        if taken(self.port):
            raise TopologyFailed(f"port {self.port} is taken", fix="--port 0 takes a free one")
        urls = self._make_stores()
        for store in self.stores:
            store.prepare()
        self.environment = {
            **self.options.environment,
            **{name: url() for name, url in urls.items()},
            "HONE_DATA_DIR": str(self.folder),
            "HONE_HOST": HOST,
            "HONE_PORT": str(self.port),
        }
        self.start([store.program() for store in self.stores])
        self._write_environment()
        self.start([self.hone("api", "api", missing=self._api_missing)])
        runners = [self.hone(name, "worker", missing=self._beats(name, "runner")) for name in self.workers]
        self.start([*runners, self.hone("sampler", "sampler", missing=self._beats("sampler", "keeper"))])

    def _make_stores(self) -> dict[str, Callable[[], str]]:
        """Servers to start; returns their settings, to be asked for once they are prepared."""
        urls: dict[str, Callable[[], str]] = {}
        if self.given.database_url is None:
            postgres = Postgres(self.folder / "postgres", free_port())
            self.stores.append(postgres)
            urls["HONE_DATABASE_URL"] = lambda: postgres.url
        if self.given.redis_url is None:
            redis = self.redis = RedisServer(self.folder / "redis", free_port())
            self.stores.append(redis)
            urls["HONE_REDIS_URL"] = lambda: redis.url
        return urls

    def _only_one(self) -> int:
        """The descriptor of a lock that goes with this process, however it ends. Raises TopologyFailed."""
        lock = os.open(self.folder / "topology.lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise TopologyFailed(f"another one runs in {self.folder}", fix="end it, or give --data DIR") from None
        return lock

    def _write_environment(self) -> None:
        """`. FILE` in a shell, and `hone` commands work on this installation."""
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in self.environment.items()]
        _write_secret(self.folder / "env.sh", "".join(lines))

    def _api_missing(self) -> str | None:
        return alive.api(load_settings(self.folder, port=self.port))

    def _beats(self, host: str, kind: str) -> Callable[[], str | None]:
        url = self.environment.get("HONE_DATABASE_URL", self.given.database_url)
        settings = load_settings(self.folder, hostname=host, database_url=url)
        return lambda: alive.process(settings, kind)

    def _accepts(self, key: str) -> bool:
        request = urllib.request.Request(f"{self.base_url}/models", headers={"Authorization": f"Bearer {key}"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=5):
                return True
        except urllib.error.HTTPError as error:
            error.close()
            return False


def lose_data(redis: RedisServer) -> None:
    """What a disk does that is gone."""
    shutil.rmtree(redis.folder)
    redis.prepare()


def _write_secret(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)
