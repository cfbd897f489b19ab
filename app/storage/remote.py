"""Objects behind any fsspec URL (`s3://bucket/prefix`, …): each call in a thread with a deadline, tried again in it.

Does not cover: the library behind a URL (extra `s3`) and its credentials: they come from that library's own variables,
or from HONE_STORAGE_OPTIONS. A put of an object store is atomic by nature, so nothing is renamed here.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from app.storage.base import Entry, check_key
from app.storage.errors import ObjectMissing, StorageUnavailable

T = TypeVar("T")
Work = Callable[[Any, str], T]  # of the file system and the path under it

ANSWER_S = 20.0  # a call that moves no bytes, all its tries together
SLOWEST = 1024**2  # bytes a second: a transfer may take as much longer
PAUSES_S = (0.5, 1.0, 2.0)  # between tries
THREADS = 8
# Of the library's own patience: ours is counted in ANSWER_S.
_BOTO = {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 1}}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {"s3": {"config_kwargs": _BOTO}, "s3a": {"config_kwargs": _BOTO}}
_SECRET = re.compile(r"secret|token|key|password|credential|auth", re.IGNORECASE)
# The same call would fail in the same way.
_FINAL = (PermissionError, IsADirectoryError, NotADirectoryError, ImportError, TypeError, ValueError)


class RemoteStore:
    """`options`: the text of HONE_STORAGE_OPTIONS. Nothing is opened before the first call."""

    def __init__(
        self, url: str, options: str | None, scratch: Path, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._full_url = url
        self._options = options
        self._scratch = scratch
        self._sleep = sleep
        self._opening = threading.Lock()
        self._opened: tuple[Any, str] | None = None
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="storage")

    @property
    def url(self) -> str:
        return redacted(self._full_url)

    def put(self, source: Path, key: str) -> None:
        def work(fs: Any, path: str) -> None:
            fs.put_file(str(source), path)
            if (stored := fs.info(path)["size"]) < size:  # a trace may have grown meanwhile
                raise OSError(f"{stored} of {size} bytes arrived")

        try:
            size = source.stat().st_size
            self._call(key, work, size)
        except FileNotFoundError as error:  # the source, or the bucket
            raise self._unavailable(error) from None

    def open(self, key: str) -> BinaryIO:
        size = self.size(key)
        if size is None:
            raise ObjectMissing(self.url, key)

        def work(fs: Any, path: str) -> BinaryIO:
            """Whoever gave up waiting leaves nothing behind: the file has no name any more."""
            self._scratch.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self._scratch)
            os.close(descriptor)
            try:
                fs.get_file(path, name)
                return Path(name).open("rb")
            finally:
                os.unlink(name)

        return self._found(key, work, size)

    def read(self, key: str, offset: int, length: int) -> bytes:
        size = self.size(key)  # a range beyond the end is an error to some stores
        if size is None:
            raise ObjectMissing(self.url, key)
        end = min(offset + length, size)
        if end <= offset:
            return b""
        return self._found(key, lambda fs, path: bytes(fs.cat_file(path, start=offset, end=end)), end - offset)

    def size(self, key: str) -> int | None:
        try:
            found = self._call(key, lambda fs, path: fs.info(path))
        except FileNotFoundError:
            return None
        return None if found["type"] == "directory" else int(found["size"])

    def delete(self, key: str) -> None:
        def work(fs: Any, path: str) -> None:
            try:
                fs.rm_file(path)
            except FileNotFoundError:
                return

        self._call(key, work)

    def entries(self, folder: str = "") -> Sequence[Entry]:
        def work(fs: Any, path: str) -> list[Entry]:
            root = path.removesuffix(folder).rstrip("/") if folder else path
            try:
                found: Mapping[str, Mapping[str, Any]] = fs.find(path, detail=True)
            except FileNotFoundError:
                return []
            return [Entry(name.removeprefix(f"{root}/"), int(info["size"])) for name, info in sorted(found.items())]

        return self._call(folder, work)

    def local(self, key: str) -> Path | None:
        return None

    def _found(self, key: str, work: Work[T], size: int) -> T:
        try:
            return self._call(key, work, size)
        except FileNotFoundError:
            raise ObjectMissing(self.url, key) from None

    def _call(self, key: str, work: Work[T], size: int = 0) -> T:
        """Raises StorageUnavailable, or FileNotFoundError for the caller to name."""
        ends = time.monotonic() + ANSWER_S + size / SLOWEST
        pauses = iter(PAUSES_S)
        while True:
            future = self._pool.submit(lambda: work(*self._at(key)))
            try:
                return future.result(max(0.0, ends - time.monotonic()))
            except FileNotFoundError:
                raise
            except TimeoutError as error:
                failure, final = self._unavailable(error, "no answer in time"), False
            except Exception as error:  # each backend raises its library's own classes: this is their boundary
                failure, final = self._unavailable(error), isinstance(error, _FINAL)
            finally:
                future.cancel()
            pause = next(pauses, None)
            if final or pause is None or time.monotonic() + pause >= ends:
                raise failure from None  # the cause may quote a credential
            self._sleep(pause)

    def _at(self, key: str) -> tuple[Any, str]:
        with self._opening:
            if self._opened is None:
                from fsspec.core import url_to_fs  # an extra, and 0.17 s to import for those who need none

                protocol = urlsplit(self._full_url).scheme
                options = {"use_listings_cache": False, **DEFAULTS.get(protocol, {}), **self._read_options()}
                fs, root = url_to_fs(self._full_url, **options)
                self._opened = fs, str(root).rstrip("/")
        fs, root = self._opened
        return fs, f"{root}/{check_key(key)}" if key else root

    def _read_options(self) -> dict[str, Any]:
        try:
            options = json.loads(self._options or "{}")
        except ValueError:
            options = None
        if not isinstance(options, dict):
            raise ValueError("HONE_STORAGE_OPTIONS is no JSON object")
        return options

    def _unavailable(self, error: BaseException, reason: str = "") -> StorageUnavailable:
        text = (reason or str(error).strip() or type(error).__name__).replace(self._full_url, self.url)
        if isinstance(error, ImportError):
            text += " (pip install 'hone-rft[s3]', or the library of another URL)"
        for secret in self._secrets():
            text = text.replace(secret, "***")
        return StorageUnavailable(self.url, text[:500])

    def _secrets(self) -> Iterator[str]:
        parts = urlsplit(self._full_url)
        if parts.password:
            yield parts.password
        try:
            yield from _leaves(self._read_options(), secret=False)
        except ValueError:
            yield self._options or "\0"


def redacted(url: str) -> str:
    """A URL as it may be shown: no user, no password, no query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _leaves(value: Any, *, secret: bool) -> Iterator[str]:
    """Texts in `value` that stand under a name like `secret` or `token`."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(part, secret=secret or _SECRET.search(str(name)) is not None)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part, secret=secret)
    elif secret and isinstance(value, str) and len(value) >= 4:
        yield value
