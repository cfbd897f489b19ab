"""A real S3 server for tests: moto's, as a process on the loopback that ends with us.

Does not cover: what only Amazon's does (permissions, throttling, consistency).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from app.core.settings import Settings
from app.storage.build import Area, open_store
from app.storage.remote import RemoteStore

SECRET = "sesame-0123456789"
_PROGRAM = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
_numbers = count()


@dataclass(frozen=True)
class S3:
    """`options` is what HONE_STORAGE_OPTIONS would be."""

    endpoint: str

    @property
    def options(self) -> dict[str, Any]:
        return {"key": "tester", "secret": SECRET, "endpoint_url": self.endpoint}

    def settings(self, data_dir: Path, **values: Any) -> Settings:
        """Of an installation with a bucket of its own."""
        bucket = f"hone-{next(_numbers)}"
        made = Settings(
            data_dir=data_dir,
            storage_url=f"s3://{bucket}/some/prefix",
            storage_options=SecretStr(json.dumps(self.options)),
            **values,
        )
        fs, _ = open_remote(made, "files")._at("")
        fs.mkdir(bucket)
        return made


def open_remote(settings: Settings, area: Area) -> RemoteStore:
    store = open_store(settings, area)
    assert isinstance(store, RemoteStore)
    return store


@contextmanager
def server() -> Iterator[S3]:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield S3(f"http://127.0.0.1:{int(process.stdout.readline())}")
    finally:
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
