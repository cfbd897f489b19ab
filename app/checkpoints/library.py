"""A checkpoint's adapter directory on this host: as its row names it, or fetched from storage; verified before use.

Does not cover: which checkpoint a name means (`app.inference.repository`). A fetched copy stays in the cache: a sampler
may have it loaded, and a deleted directory would end a vLLM. Its directory's time says when it was last asked for;
one that nobody needs is cleared away by `workers.unnamed`.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from app.checkpoints.store import ADAPTER_FILES, MANIFEST, CorruptCheckpoint, verify
from app.core.settings import Settings
from app.storage.base import ObjectStore
from app.storage.build import open_store
from app.storage.errors import ObjectMissing, StorageUnavailable
from app.storage.local import sync

log = logging.getLogger(__name__)

Stamp = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Reference:
    """What a row says of a checkpoint's files: where its worker put them, their key, the manifest's digest."""

    path: str
    key: str
    sha256: str


class Library:
    """One per process. A directory is hashed once, and again when a file in it changes."""

    def __init__(self, store: ObjectStore, cache: Path) -> None:
        self._store = store
        self._cache = cache
        self._verified: dict[Path, tuple[str, Stamp]] = {}

    @classmethod
    def of(cls, settings: Settings) -> Library:
        return cls(open_store(settings, "checkpoints"), settings.checkpoint_copies_dir)

    def locate(self, wanted: Reference) -> Path:
        """The adapter directory. Blocking. Raises CorruptCheckpoint (also when it is nowhere), StorageUnavailable."""
        for directory in self._places(wanted):
            try:
                if (directory / MANIFEST).exists():
                    self._verify(directory, wanted.sha256)
                    if directory.is_relative_to(self._cache):
                        with suppress(OSError):
                            os.utime(directory)
                    return directory
            except CorruptCheckpoint as error:
                log.error("checkpoint %s: %s; looking elsewhere", wanted.key, error)
        return self._fetch(wanted)

    def _places(self, wanted: Reference) -> Iterator[Path]:
        yield Path(wanted.path)
        kept = self._store.local(f"{wanted.key}/{MANIFEST}")
        if kept is not None and kept.parent != Path(wanted.path):
            yield kept.parent
        yield self._cache / wanted.key

    def _verify(self, directory: Path, sha256: str) -> None:
        stamp = _stamp(directory)
        if self._verified.get(directory) == (sha256, stamp):
            return
        if (found := verify(directory)) != sha256:
            raise CorruptCheckpoint(f"{directory / MANIFEST} has the sha256 {found}, recorded is {sha256}")
        self._verified[directory] = (sha256, stamp)

    def _fetch(self, wanted: Reference) -> Path:
        """Into a draft beside its place, verified, then renamed: nobody ever sees half of one."""
        target = self._cache / wanted.key
        draft = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
        try:
            draft.mkdir(parents=True)
            for name in (MANIFEST, *ADAPTER_FILES):
                with self._store.open(f"{wanted.key}/{name}") as source, (draft / name).open("wb") as copy:
                    shutil.copyfileobj(source, copy, 1024**2)
                (draft / name).chmod(0o644)
                sync(draft / name)
            draft.chmod(0o755)
            self._verify(draft, wanted.sha256)
            self._place(draft, target, wanted.sha256)
        except ObjectMissing as error:
            raise CorruptCheckpoint(f"its files are gone: {error}") from error
        except OSError as error:
            raise StorageUnavailable(str(self._cache), error.strerror or type(error).__name__) from error
        finally:
            self._verified.pop(draft, None)
            shutil.rmtree(draft, ignore_errors=True)
        return target

    def _place(self, draft: Path, target: Path, sha256: str) -> None:
        """Give the draft its name. Another process may have been faster: its copy will do, if it is right."""
        with suppress(CorruptCheckpoint):
            self._verify(target, sha256)
            return
        aside = draft.with_name(f"{draft.name}.old")
        with suppress(FileNotFoundError):
            target.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):
            draft.rename(target)
        self._verify(target, sha256)


def _stamp(directory: Path) -> Stamp:
    """Changes whenever a file of the directory does."""
    try:
        found = [(entry.name, entry.stat()) for entry in os.scandir(directory)]
    except OSError as error:
        raise CorruptCheckpoint(f"{directory}: {error}") from error
    return tuple(sorted((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found))
