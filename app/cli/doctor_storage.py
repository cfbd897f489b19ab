"""What `hone doctor` says of storage: may it be written, really, and is there room.

Does not cover: what is kept there, nor for how long (`workers.collection`).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from app.cli.findings import DEADLINE_S, Finding, NoAnswer, Verdict, quoted, within

if TYPE_CHECKING:
    from app.core.settings import Settings

GIB = 1024**3
LOW_DISK, NO_DISK = 10 * GIB, 1 * GIB
PROBE_BYTES = 4096  # what a quota or a full disk refuses; an empty file it may still take
STORAGE_S = 10.0  # an object store's library is loaded first
OWN = "chown -R $(id -u) {path}"
MENDS = {
    errno.ENOSPC: "free space on the disk of {path}",
    errno.EDQUOT: "free space on the disk of {path}, or raise the quota",
    errno.EROFS: "mount -o remount,rw the disk of {path}",
    errno.ENOTDIR: "mv {path} {path}.old: it is in the place of a directory",
}
ELSEWHERE = "choose another with --data DIR"


def data_directory(settings: Settings) -> Iterator[Finding]:
    """The directory and those below that may be disks of their own: something is written into each that is there."""
    root = settings.root
    existing = next(path for path in (root, *root.parents) if os.path.exists(path))  # unlike Path's it raises nothing
    if not existing.is_dir():
        yield Finding("data", Verdict.PROBLEM, f"{existing} is no directory", ELSEWHERE)
        return
    if existing != root:
        if os.access(existing, os.W_OK | os.X_OK):
            yield Finding("data", Verdict.OK, f"{root} (made by `hone up`)")
        else:
            yield Finding("data", Verdict.PROBLEM, f"{existing} cannot be written, so {root} not made", ELSEWHERE)
            return
    else:
        faults = list(_faults(settings))
        yield from faults or [Finding("data", Verdict.OK, str(root))]
        if faults:
            return
    free = shutil.disk_usage(existing).free
    detail, fix = f"{free / GIB:.1f} GB free", "free some space, or choose another disk with --data DIR"
    if free < NO_DISK:
        yield Finding("disk", Verdict.PROBLEM, detail, fix)
    elif free < LOW_DISK:
        yield Finding("disk", Verdict.WARNING, detail, fix)
    else:
        yield Finding("disk", Verdict.OK, detail)


def _faults(settings: Settings) -> Iterator[Finding]:
    below = (settings.files_dir, settings.models_dir, settings.jobs_dir, settings.adapters_dir,
             settings.checkpoints_dir, settings.traces_dir, settings.logs_dir)  # fmt: skip
    for path in (settings.root, *below):
        if path != settings.root and not path.exists():
            continue
        try:
            within(partial(_write, path), DEADLINE_S)
        except NoAnswer as error:
            yield Finding("data", Verdict.PROBLEM, f"{path}: {error}", "look at the disk or mount that it is on")
        except OSError as error:
            why = error.strerror or type(error).__name__
            fix = f"{MENDS.get(error.errno or 0, OWN).format(path=path)}; or {ELSEWHERE}"
            yield Finding("data", Verdict.PROBLEM, f"{path} cannot be written: {why}", fix)
        else:
            continue
        if path == settings.root:  # what is below would say the same
            return


def storage(settings: Settings) -> Iterator[Finding]:
    """Where finished files are kept, if that is not the data directory: an object goes there and back."""
    from app.files.storage_probe import StorageUnavailable, probe

    if settings.storage_url is None:
        return
    try:
        yield Finding("storage", Verdict.OK, within(lambda: probe(settings), STORAGE_S))
    except (StorageUnavailable, NoAnswer) as error:
        fix = "check HONE_STORAGE_URL, that it exists, and that the credentials may write and delete there"
        yield Finding("storage", Verdict.PROBLEM, f"HONE_STORAGE_URL: {quoted(error, settings.storage_url)}", fix)


def _write(directory: Path) -> None:
    with TemporaryFile(dir=directory) as file:
        file.write(bytes(PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
