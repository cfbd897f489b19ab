"""The faults of a storm: which kinds there are and how often, and how each is inflicted.

Does not cover: what happens inside a process that took an order (`faulty`). A fault counts when it hit: a kill that
found nobody, and an order that nobody took in time, are not counted.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from app.core.states import JobStatus
from tests.chaos.installation import Installation, Managed
from tests.chaos.jobs import Client

SUPERVISOR, DOOR = "chaos.supervisor", "chaos.door"
ORDER_S = 20.0  # an order that nobody took by then is withdrawn

# How often each kind is drawn, relative to the others.
STORM: Mapping[str, int] = {
    "kill_supervisor": 14,
    "kill_trainer": 12,
    "kill_engine": 6,
    "kill_door": 5,
    "freeze": 10,
    "freeze_writing": 3,
    "term_supervisor": 9,
    "term_door": 4,
    "database": 5,
    "lost_commit": 12,
    "refused_commit": 3,
    "disk_full": 9,
    "clock": 5,
    "broker": 5,
    "silent_create": 4,
    "doubled_ring": 5,
    "pause": 3,
    "cancel": 1,
}
COMMITS = ("any", "claim", "step_done", "checkpoint", "succeeded")
DISKS = ("checkpoint", "batch", "trace", "adapter", "snapshot")
MOST_CANCELLED = 3


@dataclass(frozen=True)
class Climate:
    """`gap_s`: between faults. `frozen_s`: of a freeze, beyond the lease. `trainer`: what its command line holds."""

    weights: Mapping[str, int] = field(default_factory=lambda: STORM)
    gap_s: tuple[float, float] = (0.3, 1.2)
    frozen_s: tuple[float, float] = (0.3, 3.0)
    trainer: str = "chaos.trainer"
    engine: str = "chaos.engine"


@dataclass
class Faults:
    """`hit` counts by kind; `strike` inflicts one. What goes on beside it is finished by `settle`."""

    installation: Installation
    client: Client
    climate: Climate
    rng: random.Random
    hit: Counter[str] = field(default_factory=Counter)
    _beside: set[asyncio.Task[None]] = field(default_factory=set)
    _frozen: set[int] = field(default_factory=set)
    _writer: bool = False  # one is frozen in the middle of writing, or about to be
    _doubles: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.hit.total()

    async def strike(self) -> None:
        kinds = [kind for kind in self.climate.weights if kind != "broker" or self.installation.broker is not None]
        kind = self.rng.choices(kinds, [self.climate.weights[kind] for kind in kinds])[0]
        inflict: Callable[[], Awaitable[bool]] = getattr(self, f"_{kind}")
        if await inflict():
            self.hit[kind] += 1

    async def settle(self) -> None:
        """Nothing is frozen, away or ordered any more."""
        await asyncio.gather(*self._beside)
        for double in self._doubles:
            await asyncio.to_thread(double.wait, 60)

    # --- signals ----------------------------------------------------------------------------------------------------

    async def _kill_supervisor(self) -> bool:
        return self._signal(signal.SIGKILL, SUPERVISOR)

    async def _kill_trainer(self) -> bool:
        return self._signal(signal.SIGKILL, self.climate.trainer)

    async def _kill_engine(self) -> bool:
        return self._signal(signal.SIGKILL, self.climate.engine, "--port")

    async def _term_supervisor(self) -> bool:
        return self._signal(signal.SIGTERM, SUPERVISOR)

    async def _kill_door(self) -> bool:
        return self._door(signal.SIGKILL)

    async def _term_door(self) -> bool:
        return self._door(signal.SIGTERM)

    def _signal(self, number: signal.Signals, *needles: str) -> bool:
        victims = self.installation.processes(*needles)
        if needles == (SUPERVISOR,) and self.rng.random() < 0.7:  # seldom one that only starts, or has ended
            victims = [pid for pid in victims if _children(pid)] or victims
        return bool(victims) and _send(self.rng.choice(victims), number)

    def _door(self, number: signal.Signals) -> bool:
        doors: list[Managed] = [door for door in self.installation.doors if door.child is not None]
        child = self.rng.choice(doors).child if doors else None
        return child is not None and child.poll() is None and _send(child.pid, number)

    async def _freeze(self) -> bool:
        """A supervisor and its trainer stop as one, and go on after the lease has been taken from them."""
        awake = [pid for pid in self.installation.processes(SUPERVISOR) if pid not in self._frozen]
        owners = {pid: trainer for pid in awake if (trainer := _children(pid))}  # the others have nothing to lose yet
        if not owners:
            return False
        supervisor = self.rng.choice(list(owners))
        both = [supervisor, *owners[supervisor]]
        if not all([_send(pid, signal.SIGSTOP) for pid in both]):
            for pid in both:
                _send(pid, signal.SIGCONT)
            return False
        self._frozen.add(supervisor)
        self._beside_this(
            self._thaw(both, self.installation.settings.lease_seconds + self.rng.uniform(*self.climate.frozen_s))
        )
        return True

    async def _freeze_writing(self) -> bool:
        """One at a time, so that somebody is left for its job; it wakes when that one wrote the checkpoint."""
        if self._writer:
            return False
        self._writer = True
        return self._order("freeze_writing", self._thaw_writer)

    async def _thaw_writer(self, taken: bool) -> None:
        for pid in await asyncio.to_thread(self._stopped) if taken else ():
            if job_id := _job_of(pid):
                await self.client.end_lease(job_id, pid)  # as a door does that believes it dead
                await self._written_by_another(job_id)
            _send(pid, signal.SIGCONT)
        self._writer = False

    async def _written_by_another(self, job_id: str) -> None:
        """Or nearly two leases went by: then it would be ended as a leftover."""
        until = time.monotonic() + 1.8 * self.installation.settings.lease_seconds
        before = await self.client.checkpoints(job_id)
        while await self.client.checkpoints(job_id) == before and time.monotonic() < until:
            await asyncio.sleep(0.3)

    def _stopped(self) -> list[int]:
        """Who took the order, once it has stopped itself. Blocks."""
        deadline = time.monotonic() + ORDER_S
        while not (found := self.installation.orders.frozen()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    async def _thaw(self, pids: list[int], after_s: float) -> None:
        await asyncio.sleep(after_s)
        for pid in reversed(pids):  # the trainer first: it has the race to run
            _send(pid, signal.SIGCONT)
        self._frozen.difference_update(pids)

    # --- what everything stands on ----------------------------------------------------------------------------------

    async def _database(self) -> bool:
        """Seldom longer than SQLite's writers wait."""
        seconds = 11.0 if self.rng.random() < 0.1 else self.rng.uniform(0.3, 3.0)
        await asyncio.to_thread(self.installation.database.fault, seconds)
        return True

    async def _broker(self) -> bool:
        broker = self.installation.broker
        assert broker is not None
        if self.rng.random() < 0.5:
            broker.broker.clear()
        else:
            await asyncio.to_thread(broker.away, self.rng.uniform(0.3, 2.0))
        return True

    # --- orders to processes ----------------------------------------------------------------------------------------

    async def _lost_commit(self) -> bool:
        return self._order(f"lost_commit@{self.rng.choice(COMMITS)}")

    async def _refused_commit(self) -> bool:
        return self._order("refused_commit")

    async def _disk_full(self) -> bool:
        return self._order(f"disk_full@{self.rng.choice(DISKS)}")

    async def _clock(self) -> bool:
        return self._order(f"clock@{self.rng.choice((3600, -3600))}")

    def _order(self, kind: str, then: Callable[[bool], Awaitable[None]] | None = None) -> bool:
        """Not a hit yet: it counts when somebody took it. `then` hears whether."""
        self._beside_this(self._watch(self.installation.orders.give(kind), kind.partition("@")[0], then))
        return False

    async def _watch(self, order: Path, kind: str, then: Callable[[bool], Awaitable[None]] | None) -> None:
        deadline = asyncio.get_running_loop().time() + ORDER_S
        while order.exists() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.2)
        taken = not self.installation.orders.withdraw(order)
        self.hit[kind] += taken
        if then is not None:
            await then(taken)

    # --- what clients and the broker do -----------------------------------------------------------------------------

    async def _silent_create(self) -> bool:
        """The API dies between the commit and the doorbell."""
        await self.client.create(ring=False)
        return True

    async def _doubled_ring(self) -> bool:
        """A message is delivered again: a second supervisor starts for a job that has one, or has ended."""
        statuses = await self.client.statuses()
        running = [job for job, status in statuses.items() if status == JobStatus.RUNNING] or list(statuses)
        if not running:
            return False
        with (self.installation.root / "logs" / "doubles.log").open("ab") as log:
            self._doubles.append(
                subprocess.Popen(
                    (sys.executable, "-m", "tests.chaos.supervisor", self.rng.choice(running)),
                    env={**os.environ, **self.installation.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
        return True

    async def _pause(self) -> bool:
        """And, a little later, on with it."""
        job_id = await self._running_job()
        if job_id is None or not await self.client.pause(job_id):
            return False
        self._beside_this(self._resume(job_id))
        return True

    async def _resume(self, job_id: str) -> None:
        await asyncio.sleep(self.rng.uniform(0.2, 3.0))
        await self.client.resume(job_id)

    async def _cancel(self) -> bool:
        job_id = await self._running_job() if len(self.client.cancelled) < MOST_CANCELLED else None
        return job_id is not None and await self.client.cancel(job_id)

    async def _running_job(self) -> str | None:
        running = [job for job, status in (await self.client.statuses()).items() if status == JobStatus.RUNNING]
        return self.rng.choice(running) if running else None

    def _beside_this(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._beside.add(task)


def _send(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _job_of(supervisor: int) -> str | None:
    """None: it was killed meanwhile."""
    try:
        line = Path(f"/proc/{supervisor}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return None
    return next((part for part in line if part.startswith("ftjob-")), None)


def _children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    found.append(int(entry.name))
    return found
