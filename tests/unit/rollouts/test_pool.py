"""Many trajectories at once: replacements, the streak that stops a job, limits, cancellation."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from app.graders.base import GraderFailed, InvalidScore
from app.tools.http import CallContext
from tests.unit.rollouts.scripted import ScriptedGrader, ScriptedPolicy, row, setting
from workers.rollouts.batch import Verdict
from workers.rollouts.pool import Pool, TooManyFailures
from workers.rollouts.stream import RowStream
from workers.rollouts.trajectory import TurnRequest
from workers.rollouts.types import Ended, RolloutKey, Row

ROWS = [row(index, kind=index % 2) for index in range(8)]


class Fixed:
    """As many at once as `limit`, first come first served; remembers the priorities it was given."""

    def __init__(self, limit: int) -> None:
        self._slots = asyncio.Semaphore(limit)
        self.asked: list[tuple[int, ...]] = []
        self.promoted: list[tuple[int, tuple[int, ...]]] = []

    @asynccontextmanager
    async def slot(self, priority: tuple[int, ...], group: int | None = None) -> AsyncIterator[None]:
        self.asked.append(priority)
        async with self._slots:
            yield

    def promote(self, group: int, priority: tuple[int, ...]) -> None:
        self.promoted.append((group, priority))


class Ledger:
    """Remembers what was started and what ended."""

    def __init__(self) -> None:
        self.started: list[RolloutKey] = []
        self.finished: list[Ended] = []

    async def start(self, keys: Sequence[RolloutKey]) -> None:
        self.started += keys

    def ended(self, ended: Ended, row: Row) -> None:
        self.finished.append(ended)


def by_sample(ledger: Ledger, score: Callable[[RolloutKey], float | Exception]) -> ScriptedGrader:
    """A score for each rollout by its key."""

    def found(context: CallContext) -> float | Exception:
        return score(next(key for key in ledger.started if key.id == context.trace_id))

    return ScriptedGrader(found)


def pool(ledger: Ledger, score: Any, *, group_size: int = 4, limit: int = 100, policy: Any = None) -> Pool:
    grader = by_sample(ledger, score)
    where = setting(policy or ScriptedPolicy(["84"]), grader)
    return Pool(where, ledger, Fixed(limit), group_size=group_size)  # type: ignore[arg-type]


def mixed(key: RolloutKey) -> float:
    return float(key.sample % 2)


async def test_a_step_is_a_group_of_siblings_for_each_row() -> None:
    ledger = Ledger()
    found = await pool(ledger, mixed).step(5, 2, RowStream(ROWS, 0), 3)
    assert [verdict for _, verdict in found.groups] == [Verdict.TRAINABLE] * 3
    assert len(ledger.started) == len(ledger.finished) == 12
    assert len({key.id for key in ledger.started}) == 12
    assert {(key.step, key.version, key.split) for key in ledger.started} == {(5, 2, "train")}
    assert len({key.group for key in ledger.started}) == 3
    for group, _ in found.groups:
        assert {member.key.row for member in group.members} == {group.row.index}
        assert sorted(member.key.sample for member in group.members) == [0, 1, 2, 3]


async def test_groups_without_signal_are_replaced_from_the_stream() -> None:
    ledger, stream = Ledger(), RowStream(ROWS, 0)
    constant = {RowStream(ROWS, 0).take()[1].index}  # the first row taken
    found = await pool(ledger, lambda key: 1.0 if key.row in constant else mixed(key)).step(1, 0, stream, 3)
    assert len(found.of(Verdict.TRAINABLE)) == 3
    assert len(found.of(Verdict.NO_SIGNAL)) == 1
    assert sorted(found.positions) == [0, 1, 2, 3]


async def test_replacements_are_bounded_by_one_extra_batch() -> None:
    ledger, stream = Ledger(), RowStream(ROWS, 0)
    found = await pool(ledger, lambda key: 1.0).step(1, 0, stream, 3)
    assert len(found.of(Verdict.NO_SIGNAL)) == len(found.groups) == 6
    assert sorted(found.positions) == [0, 1, 2, 3, 4, 5]
    assert len(ledger.started) == len(ledger.finished) == 24


async def test_dropped_groups_are_replaced_too() -> None:
    ledger = Ledger()

    def fails(key: RolloutKey) -> float | Exception:
        return InvalidScore("g", "NaN") if key.group == 1 and key.sample > 0 else mixed(key)

    found = await pool(ledger, fails).step(1, 0, RowStream(ROWS, 0), 2)
    assert (len(found.of(Verdict.DROPPED)), len(found.of(Verdict.TRAINABLE))) == (1, 2)


async def test_when_everything_fails_the_job_stops_with_the_last_words() -> None:
    ledger = Ledger()
    made = pool(ledger, lambda key: GraderFailed("g", "http://g", 4, "answered 503"), limit=4)
    with pytest.raises(TooManyFailures, match=r"of the last 16 .* \(grader_failed\).*answered 503") as caught:
        await made.step(1, 0, RowStream(ROWS, 0), 20)
    assert caught.value.state == "grader_failed"
    assert 16 <= len(ledger.finished) < 30 < len(ledger.started)
    assert made.active == {}


async def test_a_step_that_stops_leaves_no_exception_behind_that_nobody_took() -> None:
    said: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, about: said.append(about["message"]))
    made = pool(Ledger(), lambda key: GraderFailed("g", "http://g", 4, "answered 503"))  # all groups fail in one turn
    with pytest.raises(TooManyFailures):
        await made.step(1, 0, RowStream(ROWS, 0), 20)
    gc.collect()
    assert said == []


async def test_successes_in_between_do_not_hide_that_half_of_them_fail() -> None:
    def every_other(key: RolloutKey) -> float | Exception:
        return InvalidScore("g", "NaN") if key.sample % 2 else 1.0

    with pytest.raises(TooManyFailures, match="8 of the last 16"):
        await pool(Ledger(), every_other, limit=1).step(1, 0, RowStream(ROWS, 0), 20)


async def test_a_quarter_of_faults_is_lived_with() -> None:
    def rarely(key: RolloutKey) -> float | Exception:
        return InvalidScore("g", "NaN") if key.sample == 3 else mixed(key)

    found = await pool(Ledger(), rarely, limit=1).step(1, 0, RowStream(ROWS, 0), 20)
    assert len(found.of(Verdict.TRAINABLE)) == 20


async def test_too_few_rollouts_are_no_verdict() -> None:
    found = await pool(Ledger(), lambda key: InvalidScore("g", "NaN")).step(1, 0, RowStream(ROWS, 0), 1)
    assert len(found.of(Verdict.DROPPED)) == 2  # eight rollouts, all failed


async def test_no_more_rollouts_run_at_once_than_the_limit() -> None:
    running = most = 0
    full = asyncio.Event()

    async def count(request: TurnRequest) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 5:
            full.set()
        await full.wait()  # opens only when five are in flight
        await asyncio.sleep(0.005)
        running -= 1

    ledger = Ledger()
    await pool(ledger, mixed, limit=5, policy=ScriptedPolicy(["84"], before=count)).step(1, 0, RowStream(ROWS, 0), 4)
    assert most == 5


async def test_cancelling_a_step_leaves_no_task_behind() -> None:
    async def stuck(request: TurnRequest) -> None:
        await asyncio.Event().wait()

    before = asyncio.all_tasks()
    ledger = Ledger()
    made = pool(ledger, mixed, limit=3, policy=ScriptedPolicy(["84"], before=stuck))
    step = asyncio.create_task(made.step(1, 0, RowStream(ROWS, 0), 2))
    while len(made.active) < 3:
        await asyncio.sleep(0.001)
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    assert asyncio.all_tasks() == before
    assert (made.active, ledger.finished) == ({}, [])


async def test_a_bug_in_one_rollout_ends_the_step_and_all_its_tasks() -> None:
    before = asyncio.all_tasks()
    made = pool(Ledger(), mixed, policy=ScriptedPolicy([ZeroDivisionError("ours")]))
    with pytest.raises(ZeroDivisionError):
        await made.step(1, 0, RowStream(ROWS, 0), 2)
    assert asyncio.all_tasks() == before


async def test_a_validation_pass_samples_each_row_and_says_so() -> None:
    ledger = Ledger()
    policy = ScriptedPolicy(["84"])
    found = await pool(ledger, mixed, policy=policy).evaluate(ROWS[:3], 4, 2, samples=2, greedy=True)
    assert [(ended.key.row, ended.key.sample) for ended in found] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert {(key.split, key.greedy, key.step, key.version) for key in ledger.started} == {("valid", True, 4, 2)}
    assert {request.temperature for request in policy.requests} == {0.0}


async def test_groups_are_numbered_once_over_steps_and_validation() -> None:
    ledger = Ledger()
    made, stream = pool(ledger, mixed), RowStream(ROWS, 0)
    await made.step(1, 0, stream, 2)
    await made.evaluate(ROWS[:2], 1, 0, samples=1, greedy=False)
    await made.step(2, 0, stream, 2)
    assert sorted({key.group for key in ledger.started}) == [1, 2, 3, 4, 5, 6]


async def test_people_read_what_is_done_and_who_is_slow() -> None:
    gate = asyncio.Event()

    async def wait(request: TurnRequest) -> None:
        await gate.wait()

    made = pool(Ledger(), mixed, policy=ScriptedPolicy(["84"], before=wait))
    assert made.describe() is None
    steps = [asyncio.create_task(made.step(n, 0, RowStream(ROWS, 0), 2)) for n in (1, 2)]
    while len(made.active) < 16:
        await asyncio.sleep(0.001)
    assert made.describe() == "step 1: 0 of 8 rollouts done; step 2: 0 of 8 rollouts done"
    since = time.monotonic() - 41.0
    a, b, *_ = made.active.values()
    a.activity, a.activity_since = "waiting for tool refund", since
    b.activity, b.activity_since = "waiting for the grader", since + 30
    assert str(made.describe()).endswith("; the slowest is waiting for tool refund since 41 s")
    gate.set()
    await asyncio.gather(*steps)
    assert made.describe() is None


async def test_time_without_a_rollout_in_flight_is_counted_as_idle() -> None:
    made = pool(Ledger(), mixed)
    await asyncio.sleep(0.02)
    before = made.idle_s
    assert before >= 0.02

    async def slow(request: TurnRequest) -> None:
        await asyncio.sleep(0.05)

    busy = pool(Ledger(), mixed, policy=ScriptedPolicy(["84"], before=slow))
    began = time.monotonic()
    await busy.step(1, 0, RowStream(ROWS, 0), 2)
    assert busy.idle_s <= time.monotonic() - began - 0.04


async def test_groups_that_are_nearly_done_and_earlier_steps_go_first() -> None:
    admission = Fixed(100)
    ledger = Ledger()
    made = Pool(setting(ScriptedPolicy(["84"]), by_sample(ledger, mixed)), ledger, admission, group_size=3)  # type: ignore[arg-type]
    await made.step(4, 0, RowStream(ROWS, 0), 1)
    assert admission.asked == [(4, 3, 1)] * 3
    assert admission.promoted == [(1, (4, 2, 1)), (1, (4, 1, 1)), (1, (4, 0, 1))]
