"""What must hold after a storm, asked of database and disk. That jobs succeeded proves nothing by itself.

Does not cover: processes that are left over (`storm`), and the log that is kept while it storms (`audit`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession

from app.checkpoints import store
from app.core.states import TERMINAL, JobStatus, RolloutState
from app.db.engine import Database
from app.db.tables import Checkpoint, Event, Job, Rollout, Snapshot
from tests.chaos import audit
from tests.chaos.jobs import CHECKPOINTS, STEPS
from tests.chaos.tiny_policy import TENSOR_FILE, chain_of, number

CRASHED = frozenset({"worker_crashed", "worker_lost"})  # what a crash budget may rightly say
LEAST_SUCCEEDED = 0.9


@dataclass
class Verdict:
    """`figures` go on the line; `faults` say in words what did not hold."""

    figures: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def green(self) -> bool:
        return not self.faults

    def must(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.faults.append(otherwise)

    def none(self, name: str, found: Sequence[str]) -> None:
        """A figure that must be 0."""
        self.figures[name] = len(found)
        self.faults += [f"{name}: {one}" for one in found[:5]]


@dataclass(frozen=True)
class Entry:
    """A line of the audit's log."""

    kind: str
    table_name: str
    job_id: str
    step: int | None
    writer: int | None
    current: int | None
    detail: str | None

    def __str__(self) -> str:
        by = "nobody's attempt" if self.writer is None else f"attempt {self.writer}"
        return f"{self.table_name} of {self.job_id} step {self.step} by {by}, current {self.current}: {self.detail}"


async def check(database: Database, *, cancelled: Iterable[str], chained: bool) -> Verdict:
    """`chained`: the storm's own trainer ran, whose states name every batch that went into them."""
    verdict = Verdict()
    async with database.read() as session:
        jobs = (await session.scalars(select(Job).order_by(Job.created_at))).all()
        log = [
            Entry(*row) for row in await session.execute(text(f"SELECT {audit.COLUMNS} FROM {audit.LOG} ORDER BY seq"))
        ]
        checkpoints = (await session.scalars(select(Checkpoint))).all()
        _statuses(verdict, jobs, frozenset(cancelled))
        _accepted_writes(verdict, log)
        await _ledger(verdict, session, jobs)
        await _events(verdict, session, jobs, chained=chained)
    _registrations(verdict, log, jobs, checkpoints)
    _bytes(verdict, log, checkpoints)
    if chained:
        await _content(verdict, database, checkpoints)
    return verdict


def _statuses(verdict: Verdict, jobs: Sequence[Job], cancelled: frozenset[str]) -> None:
    counts = Counter(job.status for job in jobs)
    verdict.figures |= {"jobs": len(jobs)} | {str(status): counts[status] for status in sorted(TERMINAL)}
    for job in jobs:
        crashed = job.status == JobStatus.FAILED and (job.error or {}).get("code") in CRASHED
        wanted = JobStatus.CANCELLED if job.id in cancelled else JobStatus.SUCCEEDED
        told = f"{job.id} is {job.status}, not {wanted}: {job.error}, {job.activity}, attempt {job.attempt}"
        verdict.must(job.status == wanted or (crashed and job.id not in cancelled), told)
        if job.status == JobStatus.SUCCEEDED:
            verdict.must(job.step == job.total_steps == STEPS, f"{job.id} succeeded at step {job.step}")
    left = len(jobs) - len(cancelled)
    succeeded = counts[JobStatus.SUCCEEDED]
    verdict.must(succeeded >= LEAST_SUCCEEDED * left, f"{succeeded} of {left} jobs succeeded")


def _accepted_writes(verdict: Verdict, log: Sequence[Entry]) -> None:
    for kind in audit.FORBIDDEN:
        verdict.none(kind, [str(entry) for entry in log if entry.kind == kind])


def _registrations(
    verdict: Verdict, log: Sequence[Entry], jobs: Sequence[Job], checkpoints: Sequence[Checkpoint]
) -> None:
    """Steps and checkpoints: each once, by whatever attempt; none that a job which succeeded lacks."""
    registered = Counter((e.table_name, e.job_id, e.step) for e in log if e.kind == audit.REGISTERED)
    verdict.figures["steps"] = sum(table == "snapshots" for table, _, _ in registered)
    verdict.figures["checkpoints"] = len(checkpoints)
    verdict.none("double", [f"{what} was registered {n} times" for what, n in registered.items() if n > 1])
    by_job: dict[str, set[int]] = defaultdict(set)
    for checkpoint in checkpoints:
        by_job[checkpoint.job_id].add(checkpoint.step)
    for job in jobs:
        if job.status == JobStatus.SUCCEEDED:
            steps = {step for table, of, step in registered if (table, of) == ("snapshots", job.id)}
            verdict.must(steps == set(range(1, STEPS + 1)), f"{job.id} succeeded with the steps {steps}")
            found = by_job[job.id]
            verdict.must(found == set(CHECKPOINTS), f"{job.id} succeeded with the checkpoints {sorted(found)}")


def _bytes(verdict: Verdict, log: Sequence[Entry], checkpoints: Sequence[Checkpoint]) -> None:
    """Disk, row and log of the registration say the same."""
    logged = {(e.job_id, e.step): e.detail for e in log if e.kind == audit.REGISTERED and e.table_name == "checkpoints"}
    changed = []
    for one in checkpoints:
        try:
            on_disk = store.verify(Path(one.path))
        except store.CorruptCheckpoint as error:
            changed.append(str(error))
            continue
        if not on_disk == one.sha256 == logged.get((one.job_id, one.step)):
            changed.append(f"{one.path}: {on_disk[:12]} on disk, {one.sha256[:12]} in its row")
    verdict.none("changed", changed)


async def _ledger(verdict: Verdict, session: AsyncSession, jobs: Sequence[Job]) -> None:
    """Every rollout that was started is in one state; those trained for a step are of one attempt."""
    counted = await session.execute(text("SELECT job_id, rollouts FROM chaos_started"))
    started: dict[str, int] = {job: n for job, n in counted}
    rows = await session.execute(select(Rollout.job_id, Rollout.state, Rollout.step, Rollout.attempt))
    states: dict[str, Counter[str]] = defaultdict(Counter)
    attempts: dict[tuple[str, int], set[int]] = defaultdict(set)
    for job_id, state, step, attempt in rows:
        states[job_id][state] += 1
        if state == RolloutState.TRAINED:
            attempts[job_id, step].add(attempt)
    verdict.figures["rollouts"] = sum(started.values())
    over = {job.id for job in jobs if job.status in TERMINAL}
    verdict.none("open", [f"{job} has open rollouts" for job in over if states[job][RolloutState.STARTED]])
    verdict.none(
        "unbalanced", [f"{job}: {started[job]} started" for job in started if states[job].total() != started[job]]
    )
    verdict.none("trained_twice", [f"{job}: {found}" for job, found in attempts.items() if len(found) > 1])


async def _events(verdict: Verdict, session: AsyncSession, jobs: Sequence[Job], *, chained: bool) -> None:
    """One story over all attempts: every step once and in order, one end, each state out of the one before."""
    rows = await session.execute(select(Event.job_id, Event.type, Event.message, Event.data).order_by(Event.seq))
    steps: dict[str, list[dict[str, Any]]] = defaultdict(list)
    ends: Counter[str] = Counter()
    for job_id, kind, message, data in rows:
        if kind == "metrics" and "valid" not in data:
            steps[job_id].append(data)
        ends[job_id] += message == "The job has successfully completed"
    broken = []
    for job in jobs:
        told = [data["step"] for data in steps[job.id]]
        if told != list(range(1, len(told) + 1)) or (job.status == JobStatus.SUCCEEDED and len(told) != STEPS):
            broken.append(f"{job.id} tells the steps {told}")
        if ends[job.id] != (job.status == JobStatus.SUCCEEDED):
            broken.append(f"{job.id} is {job.status} and tells {ends[job.id]} happy ends")
        policies = [data["policy"] for data in steps[job.id] if "policy" in data]
        if chained:
            for before, after in pairwise(policies):
                if after["chain_before"] != before["chain"]:
                    broken.append(f"{job.id}: version {after['version']} did not grow out of {before['version']}")
    verdict.none("broken_stories", broken)


async def _content(verdict: Verdict, database: Database, checkpoints: Sequence[Checkpoint]) -> None:
    """A checkpoint holds the policy of its step."""
    async with database.read() as session:
        rows = await session.execute(
            select(Event.job_id, Event.data).where(Event.type == "metrics").order_by(Event.seq)
        )
        chains: dict[str, dict[int, float]] = defaultdict(dict)
        for job_id, data in rows:
            if "policy" in data and "valid" not in data:
                chains[job_id][data["step"]] = data["policy"]["chain"]
    wrong = []
    for one in checkpoints:
        known = chains[one.job_id]
        wanted = known.get(max((step for step in known if step <= one.step), default=0))
        try:
            found = number(chain_of((Path(one.path) / TENSOR_FILE).read_bytes()))
        except (OSError, ValueError, KeyError) as error:
            wrong.append(f"{one.path}: {error}")
            continue
        if wanted is not None and found != wanted:
            wrong.append(f"{one.path} is not what step {one.step} trained")
    verdict.none("wrong_policy", wrong)


async def changed_snapshots(database: Database) -> list[str]:
    """Snapshots of jobs that are not over whose bytes are not those of their rows; to be asked while it storms."""
    found = []
    for path, sha256 in (await _snapshots(database)).items():
        # A row may go, and its directory with it, between the look at the one and the other.
        if (
            not _is(Path(path), sha256)
            and (await _snapshots(database)).get(path) == sha256
            and not _is(Path(path), sha256)
        ):
            found.append(path)
    return found


async def _snapshots(database: Database) -> Mapping[str, str]:
    query = select(Snapshot.path, Snapshot.sha256).join(Job, Job.id == Snapshot.job_id)
    async with database.read() as session:
        rows = await session.execute(query.where(Job.status.not_in([status.value for status in TERMINAL])))
        return {path: sha256 for path, sha256 in rows if path}


def _is(directory: Path, sha256: str) -> bool:
    try:
        manifest = (directory / "manifest.json").read_bytes()
        files = json.loads(manifest)["files"]
        for name, entry in files.items():
            wanted = entry if isinstance(entry, str) else entry["sha256"]
            if hashlib.sha256((directory / name).read_bytes()).hexdigest() != wanted:
                return False
    except (OSError, ValueError, KeyError):
        return False
    return hashlib.sha256(manifest).hexdigest() == sha256
