"""Directories and logs below the data directory that no row needs, and their removal.

Does not cover: what rows need (`app.retention`) and when this is done (`workers.collection`).

Only names that we give are looked at, a few levels below our own directories, and no symbolic link is followed but one
in the place of such a directory itself: an operator's, to another disk. What belongs to a job that the database does
not know stays: another database may know it. What was written lately stays too, so that a directory may be there
before its row.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.core.settings import Settings
from app.retention.repository import Named, Standing

log = logging.getLogger("hone.collection")

JOB = re.compile(r"ftjob-[A-Za-z0-9]+")
ATTEMPT = re.compile(r"a(\d+)")
ADAPTER = re.compile(r"ftjob-[A-Za-z0-9]+-a(\d+)-v\d+(-r\d+)?(\.tmp-\w+)?")
CHECKPOINT = re.compile(r"step-\d+(\.tmp-\w+)?")
COPY = re.compile(r"(step-\d+)|\.step-\d+\.[0-9a-f]+(\.old)?")  # or a draft of one
LOG = re.compile(r"(ftjob-[A-Za-z0-9]+)\.(supervisor|trainer)\.log")
ANY = re.compile(r".+")


class Outside(Exception):
    """A path leads out of the directory that it was found in: a link was put in its way."""


@dataclass(frozen=True)
class Unnamed:
    """What may go. area: the directory of ours that it was found in."""

    area: Path
    path: Path
    bytes: int


def find(settings: Settings, named: Named, *, now: float) -> Iterator[Unnamed]:
    """Blocking. `now`: by the clock that stamps files."""
    areas = (
        (settings.jobs_dir, _of_jobs(settings.jobs_dir, named), settings.collect_after_s),
        (settings.adapters_dir, _of_adapters(settings.adapters_dir, named), settings.collect_after_s),
        (settings.checkpoints_dir, _of_checkpoints(settings.checkpoints_dir, named), settings.collect_after_s),
        (settings.checkpoint_copies_dir, _of_copies(settings.checkpoint_copies_dir, named), settings.collect_after_s),
        (settings.incoming_dir, iter(_entries(settings.incoming_dir)), settings.collect_after_s),
        (settings.logs_dir, _of_logs(settings.logs_dir, named), settings.logs_kept_days * 86400.0),
    )
    for area, paths, kept_s in areas:
        for path in paths:
            try:
                newest, size = _measure(path)
            except FileNotFoundError:  # somebody is at it
                continue
            except OSError as error:
                log.warning("%s: %s", path, error)
                continue
            if newest < now - kept_s:
                yield Unnamed(area, path, size)


def remove(unnamed: Unnamed) -> None:
    """Raises `Outside`, OSError. rmtree goes by descriptors: it follows no link that is put there meanwhile."""
    if not unnamed.path.parent.resolve().is_relative_to(unnamed.area.resolve()):
        raise Outside(f"{unnamed.path} is not below {unnamed.area}")
    if unnamed.path.is_dir() and not unnamed.path.is_symlink():
        shutil.rmtree(unnamed.path)
    else:
        unnamed.path.unlink()


def _of_jobs(area: Path, named: Named) -> Iterator[Path]:
    """All of a job that is over; else attempts without a snapshot to resume from, and what those with one also hold."""
    for job, standing in _jobs(area, named):
        if standing.over:
            yield job
            continue
        for attempt in _folders(job, ATTEMPT):
            if standing.may_be_written(int(attempt.name[1:])):
                continue
            kept = {place[2] for place in named.snapshots if place[:2] == (job.name, attempt.name)}
            if not kept:
                yield attempt
                continue
            for part in _folders(attempt, ANY):
                if part.name == "snapshots":
                    yield from (snapshot for snapshot in _folders(part, ANY) if snapshot.name not in kept)
                else:
                    yield part


def _of_adapters(area: Path, named: Named) -> Iterator[Path]:
    """Versions that no sampler has loaded and nobody holds: a directory that vanishes under vLLM ends it."""
    for job, standing in _jobs(area, named):
        for version in _folders(job, ADAPTER):
            found = ADAPTER.fullmatch(version.name)
            attempt = int(found[1]) if found else standing.attempt
            if version.name not in named.adapters and not standing.may_be_written(attempt):
                yield version
        yield from _if_empty(job, standing)


def _of_checkpoints(area: Path, named: Named) -> Iterator[Path]:
    """Those whose attempt died before the row, and drafts."""
    for job, standing in _jobs(area, named):
        for attempt in _folders(job, ATTEMPT):
            if standing.may_be_written(int(attempt.name[1:])):
                continue
            for step in _folders(attempt, CHECKPOINT):
                if (job.name, attempt.name, step.name) not in named.checkpoints:
                    yield step
            yield from _if_empty(attempt, standing)


def _of_copies(area: Path, named: Named) -> Iterator[Path]:
    """Fetched from storage, which has them still; whoever uses one touches it. Only what a sampler has loaded stays."""
    for job, standing in _jobs(area, named):
        for attempt in _folders(job, ATTEMPT):
            for step in _folders(attempt, COPY):
                if (job.name, attempt.name, step.name) not in named.loaded:
                    yield step
            yield from _if_empty(attempt, standing)
        yield from _if_empty(job, standing)


def _of_logs(area: Path, named: Named) -> Iterator[Path]:
    for path in _entries(area):
        found = LOG.fullmatch(path.name)
        standing = named.jobs.get(found[1]) if found else None
        if standing is not None and standing.over and path.is_file() and not path.is_symlink():
            yield path


def _jobs(area: Path, named: Named) -> Iterator[tuple[Path, Standing]]:
    for job in _folders(area, JOB):
        if (standing := named.jobs.get(job.name)) is not None:
            yield job, standing


def _folders(parent: Path, name: re.Pattern[str]) -> Iterator[Path]:
    """Real directories only, with a name that fits."""
    for path in _entries(parent):
        if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            yield path


def _entries(parent: Path) -> list[Path]:
    try:
        return sorted(parent.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        log.warning("%s: %s", parent, error)
        return []


def _if_empty(path: Path, standing: Standing) -> Iterator[Path]:
    if standing.over and not _entries(path):
        yield path


def _measure(path: Path) -> tuple[float, int]:
    """Newest change of anything in it, and its size. Raises FileNotFoundError when it changes meanwhile."""
    found = path.lstat()
    newest, size = found.st_mtime, found.st_size if path.is_file() else 0
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            found = Path(folder, name).lstat()
            newest = max(newest, found.st_mtime)
            size += found.st_size if name in files else 0
    return newest, size
