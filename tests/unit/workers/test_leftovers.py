"""Real processes: a supervisor that was killed, and a trainer that neither its leash nor SIGTERM ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from app.core.settings import Settings
from app.db.engine import Database, now
from app.db.tables import Worker
from tests.processes import family, gone
from tests.unit.workers.stub_left_behind import ME
from workers import identity
from workers.leftovers import FROZEN_LEASES, end_leftovers
from workers.presence import Presence
from workers.process import Child, spawn

ROOT = Path(__file__).parents[3]
START_S = 30.0


class LeftBehind:
    """A supervisor and its trainer: `door` is the supervisor as its door sees it, `trainer` leads the other group."""

    def __init__(self, door: Child, trainer: int) -> None:
        self.door, self.trainer = door, trainer


@pytest.fixture
async def left(settings: Settings, database: Database) -> AsyncIterator[LeftBehind]:
    notes = settings.root / "notes"
    environment = {**settings.environment(), "PYTHONPATH": str(ROOT)}
    door = spawn(
        [*ME, str(notes), "ftjob-1"], log=settings.logs_dir / "x.log", environment=environment, leash=(), trusted=True
    )
    deadline = time.monotonic() + START_S
    while not (notes.exists() and notes.read_text()) or len(family(int(notes.read_text()))) < 2:
        assert time.monotonic() < deadline, (settings.logs_dir / "x.log").read_text()
        await asyncio.sleep(0.02)
    trainer = int(notes.read_text())
    yield LeftBehind(door, trainer)
    for pid in family(trainer):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    door.kill()


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "300"], process_group=0)
    yield process
    process.kill()
    process.wait()


async def rows(database: Database) -> list[Worker]:
    async with database.read() as session:
        return list((await session.scalars(select(Worker))).all())


async def change(database: Database, **values: Any) -> None:
    async with database.begin() as session:
        await session.execute(update(Worker).values(**values))


async def dead(pid: int) -> None:
    """A killed process may take a moment on a busy host."""
    deadline = time.monotonic() + START_S
    while (seen := identity.look(pid)) is not None and not seen.dead:
        assert time.monotonic() < deadline, f"{pid} still runs"
        await asyncio.sleep(0.01)


async def test_the_trainer_of_a_killed_supervisor_is_ended_with_all_its_ranks_and_the_row_goes(
    settings: Settings, database: Database, left: LeftBehind
) -> None:
    os.kill(left.door.pid, signal.SIGKILL)  # nobody reaps it: to us it is dead all the same
    await dead(left.door.pid)
    os.killpg(left.trainer, signal.SIGTERM)
    assert not gone(left.trainer, within_s=0.5)
    await end_leftovers(database, settings)
    assert gone(left.trainer, within_s=0.0)
    assert await rows(database) == []


async def test_nothing_of_a_supervisor_that_works_is_touched(
    settings: Settings, database: Database, left: LeftBehind
) -> None:
    await end_leftovers(database, settings)
    assert len(family(left.trainer)) == 2
    assert len(await rows(database)) == 1
    assert left.door.poll() is None


async def test_a_supervisor_frozen_past_its_lease_is_ended_with_its_trainer(
    settings: Settings, database: Database, left: LeftBehind
) -> None:
    os.kill(left.door.pid, signal.SIGSTOP)
    await change(database, heartbeat=now() - FROZEN_LEASES * settings.lease_seconds - 1)
    await end_leftovers(database, settings)
    assert gone(left.trainer, within_s=0.0)
    assert gone(left.door.pid, within_s=0.0)
    assert await rows(database) == []


def vanish(pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if its parent had taken note of its death; here nobody may."""
    look = identity.look
    monkeypatch.setattr(identity, "look", lambda asked: None if asked == pid else look(asked))


async def test_a_rank_whose_leader_is_gone_is_known_by_its_mark(
    settings: Settings, database: Database, left: LeftBehind, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pid in (left.door.pid, left.trainer):
        os.kill(pid, signal.SIGKILL)
    await dead(left.door.pid)
    vanish(left.trainer, monkeypatch)
    await end_leftovers(database, settings)
    assert gone(left.trainer, within_s=5.0)


async def test_a_group_that_was_given_a_dead_ones_number_lives_even_without_its_leader(
    settings: Settings, database: Database, bystander: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    await Presence(database, "supervisor", settings.hostname, "ftjob-1").announce()
    second = subprocess.Popen(["sleep", "300"], process_group=bystander.pid)
    vanish(bystander.pid, monkeypatch)
    await change(database, process_started=1, trainer_pid=bystander.pid, trainer_started=1)
    await end_leftovers(database, settings)
    assert second.poll() is None
    second.kill()
    second.wait()


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param(lambda pid, started: {"trainer_pid": pid, "trainer_started": started - 1}, id="trainer"),
        pytest.param(lambda pid, started: {"pid": pid, "process_group": pid}, id="supervisor"),
    ],
)
async def test_a_process_that_was_given_a_dead_ones_id_lives(
    settings: Settings,
    database: Database,
    bystander: subprocess.Popen[bytes],
    lie: Callable[[int, int], dict[str, Any]],
) -> None:
    await Presence(database, "supervisor", settings.hostname, "ftjob-1").announce()
    seen = identity.look(bystander.pid)
    assert seen is not None
    await change(database, process_started=seen.started - 1, **lie(bystander.pid, seen.started))
    await end_leftovers(database, settings)
    assert bystander.poll() is None
    assert await rows(database) == []


async def test_only_rows_of_this_boot_and_pid_namespace_are_judged(
    settings: Settings, database: Database, left: LeftBehind
) -> None:
    await change(database, place="another-boot/pid:[1]", process_started=1)
    await end_leftovers(database, settings)
    assert len(family(left.trainer)) == 2
    assert len(await rows(database)) == 1


async def test_a_group_that_is_not_its_own_is_none_of_its_leavings(
    settings: Settings, database: Database, bystander: subprocess.Popen[bytes]
) -> None:
    """A supervisor started from a shell or a test belongs to the group of that."""
    await Presence(database, "supervisor", settings.hostname).announce()
    await change(database, pid=2**22 + 1, process_group=bystander.pid)
    await end_leftovers(database, settings)
    assert bystander.poll() is None
    assert await rows(database) == []


async def test_what_sigkill_does_not_end_keeps_its_row_for_another_try(
    settings: Settings, database: Database, left: LeftBehind, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.kill(left.door.pid, signal.SIGKILL)
    await dead(left.door.pid)
    monkeypatch.setattr(identity, "GONE_S", 0.1)
    monkeypatch.setattr(identity.signal, "SIGKILL", 0)  # as in a driver call that never returns
    await end_leftovers(database, settings)
    assert len(await rows(database)) == 1
    monkeypatch.undo()
    await end_leftovers(database, settings)
    assert gone(left.trainer, within_s=0.0)
    assert await rows(database) == []
