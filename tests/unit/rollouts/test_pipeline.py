"""Sampling ahead: what is open when, at which version, and how a fault in any of it comes out."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.rollouts.scripted import row
from workers.pipeline import Pipeline
from workers.rollouts.pool import StepRollouts
from workers.rollouts.stream import RowStream

ROWS = [row(index) for index in range(8)]


class Collector:
    """A pool whose steps end when they are told to."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, int]] = []
        self.ends: dict[int, asyncio.Event | Exception] = {}

    async def step(self, step: int, version: int, stream: RowStream, batch_size: int) -> StepRollouts:
        self.begun.append((step, version))
        positions = [stream.take()[0] for _ in range(batch_size)]
        end = self.ends.setdefault(step, asyncio.Event())
        if isinstance(end, Exception):
            raise end
        await end.wait()
        return StepRollouts(step, version, [], positions, 0.0)

    def end(self, step: int) -> None:
        event = self.ends.setdefault(step, asyncio.Event())
        assert isinstance(event, asyncio.Event)
        event.set()


def pipeline(pool: Collector, staleness: int, total: int = 6) -> Pipeline:
    stream = RowStream(ROWS, 0)
    return Pipeline(pool, stream, batch_size=2, total_steps=total, max_staleness=staleness)  # type: ignore[arg-type]


@pytest.mark.parametrize("staleness", [0, 1, 3])
async def test_a_step_is_never_sampled_from_a_version_older_than_allowed(staleness: int) -> None:
    pool = Collector()
    made = pipeline(pool, staleness)
    made.advance(0, 0)
    for step in range(1, 7):
        pool.end(step)
        rollouts = await asyncio.wait_for(made.next(step), 5)
        assert rollouts.step == step
        assert 0 <= (step - 1) - rollouts.version <= staleness
        made.advance(step, step)
    assert [step for step, _ in pool.begun] == [1, 2, 3, 4, 5, 6]  # the finite data is used to the end, and no more
    assert made.versions() == set()


async def test_strictly_on_policy_nothing_is_sampled_ahead() -> None:
    pool = Collector()
    made = pipeline(pool, 0)
    made.advance(0, 0)
    await asyncio.sleep(0)
    assert pool.begun == [(1, 0)]
    pool.end(1)
    await made.next(1)
    await asyncio.sleep(0)
    assert pool.begun == [(1, 0)]  # while step 1 is trained
    made.advance(1, 1)
    await asyncio.sleep(0)
    assert pool.begun == [(1, 0), (2, 1)]
    await made.close()


async def test_the_next_step_is_sampled_while_this_one_is_trained() -> None:
    pool = Collector()
    made = pipeline(pool, 1)
    made.advance(0, 0)
    pool.end(1)
    await made.next(1)
    assert pool.begun == [(1, 0), (2, 0)]
    assert made.versions() == {0}
    made.advance(1, 1)
    await asyncio.sleep(0)
    assert pool.begun[-1] == (3, 1)
    assert made.versions() == {0, 1}
    await made.close()


async def test_a_step_waits_for_its_own_groups_though_later_ones_are_ready() -> None:
    pool = Collector()
    made = pipeline(pool, 2)
    made.advance(0, 0)
    pool.end(2)
    waiting = asyncio.create_task(made.next(1))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    pool.end(1)
    assert (await asyncio.wait_for(waiting, 5)).step == 1
    assert (await asyncio.wait_for(made.next(2), 5)).positions == [2, 3]
    await made.close()


async def test_a_fault_in_a_later_collection_comes_out_at_once() -> None:
    pool = Collector()
    pool.ends[2] = ZeroDivisionError("ours")
    made = pipeline(pool, 1)
    made.advance(0, 0)
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(made.next(1), 5)
    await made.close()


async def test_closing_leaves_no_task() -> None:
    before = asyncio.all_tasks()
    made = pipeline(Collector(), 3)
    made.advance(0, 0)
    await asyncio.sleep(0)
    await made.close()
    assert asyncio.all_tasks() == before


async def test_a_resumed_job_begins_at_its_step_and_version() -> None:
    pool = Collector()
    made = pipeline(pool, 1)
    made.advance(3, 2)  # one step had nothing to learn from: versions lag behind steps
    await asyncio.sleep(0)
    assert pool.begun == [(4, 2), (5, 2)]
    await made.close()
