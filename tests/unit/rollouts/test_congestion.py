"""Admission follows what sampler and tools carry; simulated ones, in virtual time."""

from __future__ import annotations

import asyncio
import random

import pytest

from app.samplers.errors import SamplerUnavailable
from app.samplers.metrics import SamplerLoad
from tests.unit.rollouts.simulated import ROOMY, Engine, traffic
from tests.unit.rollouts.virtual_time import clock, simulate
from workers.rollouts.congestion import Congestion


def load(**values: object) -> SamplerLoad:
    return SamplerLoad(**{**vars(ROOMY), **values})  # type: ignore[arg-type]


# --- the limit ---


def test_it_settles_where_the_engines_rows_are_full_and_its_queue_is_short() -> None:
    async def main() -> None:
        engine, congestion = Engine(rows=40, kv=1000), Congestion(floor=4, ceiling=1000, clock=clock)
        limits = await traffic(congestion, [engine.turn] * 300, 150, engine.loads)
        assert max(limits) < 200  # the first probe overshoots once
        assert all(36 <= limit <= 64 for limit in limits[50:])
        assert engine.served >= 0.97 * 40 * 149

    simulate(main())


def test_it_settles_below_a_full_cache_and_recovers_when_there_is_more() -> None:
    async def main() -> None:
        engine, congestion = Engine(rows=10_000, kv=100), Congestion(floor=8, ceiling=1000, clock=clock)
        limits = await traffic(congestion, [engine.turn] * 400, 80, engine.loads)
        assert all(60 <= limit <= 85 for limit in limits[30:])
        engine.kv = 400
        limits = await traffic(congestion, [engine.turn] * 400, 80, engine.loads)
        assert all(240 <= limit <= 330 for limit in limits[50:])

    simulate(main())


@pytest.mark.parametrize(
    ("sign", "why"),
    [
        (load(preemptions=3), "pre-empted 3 requests"),
        (load(kv_usage=0.95), "KV cache 95% full"),
        (load(kv_usage=0.85), "KV cache 85% full"),
    ],
)
async def test_signs_of_pressure_lower_the_limit_and_are_named(sign: SamplerLoad, why: str) -> None:
    congestion = Congestion(floor=4, ceiling=100, start=40)
    congestion.observe_sampler(ROOMY)
    congestion.in_flight = 40
    congestion.observe_sampler(sign)
    assert congestion.limit in (30, 38)
    assert why in congestion.describe()["last_change"]["why"]


async def test_while_more_run_than_allowed_there_is_no_second_cut() -> None:
    congestion = Congestion(floor=4, ceiling=100, start=40)
    congestion.in_flight = 40
    for _ in range(50):
        congestion.observe_sampler(load(kv_usage=0.99))
    assert congestion.limit == 30


async def test_the_limit_never_falls_below_a_group() -> None:
    congestion = Congestion(floor=8, ceiling=100)
    for _ in range(50):
        congestion.in_flight = congestion.limit
        congestion.observe_sampler(load(kv_usage=0.99))
    assert congestion.limit == 8


async def test_a_limit_that_nobody_reaches_does_not_grow() -> None:
    congestion = Congestion(floor=4, ceiling=1000, start=20)
    congestion.in_flight = 10
    for _ in range(10):
        congestion.observe_sampler(ROOMY)
    assert congestion.limit == 20


async def test_a_cut_starts_from_what_runs_not_from_a_limit_that_nobody_reached() -> None:
    congestion = Congestion(floor=4, ceiling=100, start=80)
    congestion.in_flight = 20
    congestion.observe_sampler(load(kv_usage=0.99))
    assert congestion.limit == 15


async def test_a_queue_that_comes_and_goes_with_a_burst_is_no_congestion() -> None:
    congestion = Congestion(floor=4, ceiling=100, start=40)
    congestion.in_flight = 40
    for waiting in (30, 30, 0) * 5:
        congestion.observe_sampler(load(running=10, waiting=waiting))
    assert congestion.limit == 40
    for _ in range(3):
        congestion.observe_sampler(load(running=10, waiting=34))
    assert congestion.limit == 30
    assert congestion.describe()["last_change"]["why"] == "sampler queue 34 waiting, 10 running"


async def test_a_sampler_that_joins_or_restarts_is_no_preemption() -> None:
    congestion = Congestion(floor=4, ceiling=100, start=40)
    congestion.in_flight = 40
    for sign in (load(preemptions=5), load(preemptions=25, samplers=2), load(preemptions=0, samplers=2)):
        congestion.observe_sampler(sign)
    assert congestion.limit == 40


def test_a_sampler_that_is_away_moves_nothing_and_ends_nothing() -> None:
    async def main() -> None:
        away = False

        async def loads() -> list[SamplerLoad]:
            if away:
                raise SamplerUnavailable("gone", url="http://s")
            return [load(kv_usage=0.7)]

        congestion = Congestion(floor=4, ceiling=100, start=40, clock=clock)
        poll = asyncio.create_task(congestion.poll(loads))
        await asyncio.sleep(3)
        away, congestion._bound = True, True
        await asyncio.sleep(10)
        assert congestion.limit == 40
        assert not poll.done()
        poll.cancel()

    simulate(main())


def test_one_that_never_tells_its_load_is_bounded_by_the_ceiling_alone() -> None:
    async def main() -> None:
        async def loads() -> list[SamplerLoad]:
            return []

        engine, congestion = Engine(rows=1000, kv=1000), Congestion(floor=4, ceiling=100, start=8, clock=clock)
        assert (await traffic(congestion, [engine.turn] * 200, 10, loads))[-1] == 100

    simulate(main())


def test_a_sampler_that_hangs_is_given_up_after_a_deadline() -> None:
    async def main() -> None:
        asked = 0

        async def loads() -> list[SamplerLoad]:
            nonlocal asked
            asked += 1
            await asyncio.sleep(3600)
            return []

        poll = asyncio.create_task(Congestion(floor=1, ceiling=2, clock=clock).poll(loads))
        await asyncio.sleep(20)
        poll.cancel()
        assert asked == 4

    simulate(main())


# --- who goes next ---


async def test_the_lowest_priority_goes_first_and_equals_in_order() -> None:
    congestion = Congestion(floor=1, ceiling=1, start=1)
    order: list[str] = []

    async def one(name: str, priority: tuple[int, ...]) -> None:
        async with congestion.slot(priority):
            order.append(name)
            await asyncio.sleep(0)

    names = [("first", (9,)), ("b1", (1, 2)), ("b2", (1, 2)), ("a", (0, 7)), ("b3", (1, 2)), ("c", (2,))]
    await asyncio.gather(*(one(name, priority) for name, priority in names))
    assert order == ["first", "a", "b1", "b2", "b3", "c"]


async def test_a_group_that_is_nearly_done_is_moved_up() -> None:
    congestion = Congestion(floor=1, ceiling=1, start=1)
    order: list[int] = []

    async def one(group: int) -> None:
        async with congestion.slot((1, 4, group), group):
            order.append(group)
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(one(group)) for group in (1, 2, 2, 3, 3)]
    await asyncio.sleep(0)
    congestion.promote(3, (1, 1, 3))
    congestion.promote(2, (1, 3, 2))
    await asyncio.gather(*tasks)
    assert order == [1, 3, 3, 2, 2]
    assert congestion._line.groups == {}


async def test_a_cancelled_waiter_neither_keeps_nor_loses_a_place() -> None:
    rng, congestion = random.Random(1), Congestion(floor=1, ceiling=3, start=3)

    async def one() -> None:
        async with congestion.slot((rng.randrange(5),)):
            await asyncio.sleep(rng.random() / 500)

    tasks = [asyncio.create_task(one()) for _ in range(300)]
    for _ in range(120):
        await asyncio.sleep(0)
        rng.choice(tasks).cancel()
        assert congestion.in_flight <= 3
    await asyncio.gather(*tasks, return_exceptions=True)
    assert congestion.in_flight == congestion.waiting == 0
    async with asyncio.timeout(1):
        await one()


@pytest.mark.parametrize("kind", ["slot", "tool"])
async def test_who_is_let_in_and_cancelled_in_the_same_moment_gives_the_place_back(kind: str) -> None:
    congestion = Congestion(floor=1, ceiling=1, start=1)
    congestion._gate("t")._room = 1.0
    place = {"slot": lambda: congestion.slot((0,)), "tool": lambda: congestion.tool("t")}[kind]
    entered = asyncio.Event()

    async def wait() -> None:
        async with place():
            entered.set()

    async with place():
        first, second = asyncio.create_task(wait()), asyncio.create_task(wait())
        await asyncio.sleep(0)
    first.cancel()  # its turn has come, it has not run yet
    async with asyncio.timeout(5):
        await asyncio.gather(first, second, return_exceptions=True)
    assert first.cancelled()
    assert entered.is_set()
    assert congestion.in_flight == congestion._gate("t").in_flight == 0
