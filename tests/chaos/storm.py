"""One storm from start to end: jobs, faults at random moments until both are used up, calm, verdict.

Does not cover: the kinds of fault (`faults`), what is asked afterwards (`checker`), several storms (`__main__`).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from app.core.states import TERMINAL, JobStatus
from app.db.tables import Job
from tests.chaos.audit import Identity
from tests.chaos.checker import Verdict, changed_snapshots, check
from tests.chaos.faults import Climate, Faults
from tests.chaos.installation import LEASE_S, Installation, installation
from tests.chaos.jobs import Client

AT_ONCE = 5  # jobs that are open while it storms: as many as run, and one that waits
GONE_S = 30.0  # for the processes of jobs that are over
WATCH_S = 1.0


@dataclass(frozen=True)
class Plan:
    database: str
    jobs: int
    faults: int
    seed: int
    climate: Climate = field(default_factory=Climate)
    mutation: str | None = None
    sync_s: float = 0.02
    lease_s: float = LEASE_S
    models: Path | None = None  # of the real engine and trainer; None: the storm's own
    answer: str = "yes"
    most_s: float = 3600.0
    calm_s: float = 240.0  # for what is open when the last fault was inflicted


@dataclass(frozen=True)
class Outcome:
    plan: Plan
    verdict: Verdict
    hit: dict[str, int]
    orphans: Sequence[str]
    attempts: int
    seconds: float

    @property
    def green(self) -> bool:
        return self.verdict.green and not self.orphans

    def line(self) -> str:
        kinds = " ".join(f"{kind}={n}" for kind, n in sorted(self.hit.items()))
        figures = " ".join(f"{name}={n}" for name, n in self.verdict.figures.items())
        what = f"{self.plan.database} seed={self.plan.seed}" + (
            f" mutation={self.plan.mutation}" if self.plan.mutation else ""
        )
        return (
            f"{what}: {figures} orphans={len(self.orphans)} attempts={self.attempts} "
            f"faults={sum(self.hit.values())} ({kinds}) seconds={self.seconds:.0f} {'green' if self.green else 'RED'}"
        )


async def storm(plan: Plan, root: Path) -> Outcome:
    """Blocking parts run beside the loop. Everything it starts has ended when it returns."""
    began = time.monotonic()
    opened = installation(
        plan.database, root, models=plan.models, mutation=plan.mutation, sync_s=plan.sync_s, lease_s=plan.lease_s
    )
    running = await asyncio.to_thread(opened.__enter__)
    try:
        return await _storm(plan, running, began)
    finally:
        await asyncio.to_thread(opened.__exit__, None, None, None)


async def _storm(plan: Plan, running: Installation, began: float) -> Outcome:
    Identity().adopt()
    client = Client(running.settings, plan.answer)
    faults = Faults(running, client, plan.climate, random.Random(plan.seed))
    changed: set[str] = set()
    watching = asyncio.create_task(_watch_snapshots(client, changed))
    try:
        late = await _weather(plan, client, faults, began + plan.most_s)
        await faults.settle()
        late = await _calm(client, plan.calm_s) or late
        left = await _left_over(running)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        verdict = await client.patiently(
            lambda: check(client.database, cancelled=client.cancelled, chained=plan.models is None)
        )
        verdict.none("changed_snapshots", sorted(changed))
        verdict.must(not late, late)
        attempts = await _attempts(client)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await client.close()
    await asyncio.to_thread(running.stop)
    left += [f"after the end: {pid}" for pid in running.processes()]
    return Outcome(plan, verdict, dict(faults.hit), left, attempts, time.monotonic() - began)


async def _weather(plan: Plan, client: Client, faults: Faults, until: float) -> str:
    """Faults and new jobs until both are used up. What was late, in words.

    Where jobs are slow the faults wait for them: so many a job, on any machine.
    """
    while faults.count < plan.faults or len(client.created) < plan.jobs:
        if time.monotonic() > until:
            return f"only {faults.count} faults and {len(client.created)} jobs in {plan.most_s:.0f} s"
        open_ = [job for job, status in (await client.statuses()).items() if status not in TERMINAL]
        if len(open_) < min(AT_ONCE, plan.jobs):
            await client.create()
            continue
        await asyncio.sleep(faults.rng.uniform(*plan.climate.gap_s))
        if faults.count * plan.jobs <= len(client.created) * plan.faults:
            await faults.strike()
    return ""


async def _calm(client: Client, within_s: float) -> str:
    """Every job ends by itself now. Those that are not, in words."""
    deadline = time.monotonic() + within_s
    while open_ := {job: status for job, status in (await client.statuses()).items() if status not in TERMINAL}:
        if time.monotonic() > deadline or all(status == JobStatus.PAUSED for status in open_.values()):
            return f"not over: {open_}"
        await asyncio.sleep(0.5)
    return ""


async def _left_over(running: Installation) -> list[str]:
    """Processes of jobs though all jobs are over."""
    deadline = time.monotonic() + GONE_S
    needles = ("chaos.supervisor", "chaos.trainer", "workers.trainer")
    while left := [(needle, pid) for needle in needles for pid in running.processes(needle)]:
        if time.monotonic() > deadline:
            return [f"{needle} {pid}" for needle, pid in left]
        await asyncio.sleep(0.2)
    return []


async def _watch_snapshots(client: Client, changed: set[str]) -> None:
    while True:
        await asyncio.sleep(WATCH_S)
        with suppress(SQLAlchemyError):  # the database is away: look again
            changed.update(await changed_snapshots(client.database))


async def _attempts(client: Client) -> int:
    async with client.database.read() as session:
        return await session.scalar(select(func.sum(Job.attempt))) or 0
