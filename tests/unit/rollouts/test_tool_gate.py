"""Calls of a tool follow what it takes at once; a simulated tool, in virtual time."""

from __future__ import annotations

import asyncio
import random

import pytest

from app.net.exchange import Attempted
from app.samplers.metrics import SamplerLoad
from tests.unit.rollouts.simulated import ROOMY, Life, Tool, traffic
from tests.unit.rollouts.virtual_time import clock, simulate
from workers.rollouts.congestion import Congestion
from workers.rollouts.tool_gate import ToolBusy


def calls(congestion: Congestion, name: str, tool: Tool) -> Life:
    async def life() -> None:
        async with congestion.tool(name) as turn:
            await tool.call(turn.watch)

    return life


def test_calls_settle_near_what_the_tool_takes_at_once() -> None:
    async def main() -> None:
        tool, congestion = Tool(most=20), Congestion(floor=4, ceiling=200, start=200, clock=clock)
        await traffic(congestion, [calls(congestion, "t", tool)] * 100, 60)
        tool.refused = tool.answered = 0
        await traffic(congestion, [calls(congestion, "t", tool)] * 100, 300)
        assert tool.answered >= 0.8 * 20 * 299
        assert tool.refused <= 0.05 * tool.answered

    simulate(main())


def test_one_busy_tool_does_not_slow_another() -> None:
    async def main() -> None:
        busy, free = Tool(most=5), Tool(most=10_000)
        congestion = Congestion(floor=4, ceiling=200, start=200, clock=clock)
        lives = [calls(congestion, "busy", busy)] * 50 + [calls(congestion, "free", free)] * 50
        await traffic(congestion, lives, 100)
        assert free.answered >= 50 * 98
        assert list(congestion.describe()["tools"]) == ["busy"]
        assert congestion.describe()["tools"]["busy"]["why"] == "answered 429"

    simulate(main())


def test_a_line_at_a_tool_lowers_the_number_of_trajectories() -> None:
    async def main() -> None:
        tool, congestion = Tool(most=10), Congestion(floor=4, ceiling=200, start=200, clock=clock)

        async def loads() -> list[SamplerLoad]:
            return [ROOMY]

        limits = await traffic(congestion, [calls(congestion, "search", tool)] * 300, 300, loads)
        assert all(7 <= limit <= 30 for limit in limits[60:])
        change = congestion.change
        assert change is not None
        assert "calls wait for tool search (answered 429)" in change.why or change.after > change.before

    simulate(main())


def test_retry_after_holds_every_call_of_the_tool() -> None:
    async def main() -> None:
        congestion = Congestion(floor=1, ceiling=100, clock=clock)
        async with congestion.tool("t") as turn:
            turn.watch(Attempted(429, 0.0, 7.0))
        async with congestion.tool("other") as turn:
            assert turn.queued_s == 0
        async with congestion.tool("t") as turn:
            assert turn.queued_s == pytest.approx(7.0)

    simulate(main())


def test_a_call_does_not_wait_in_line_beyond_its_deadline() -> None:
    async def main() -> None:
        gate = Congestion(floor=1, ceiling=100, clock=clock)._gate("t")
        async with gate.turn(None) as turn:
            turn.watch(Attempted(503, 0.0))
            with pytest.raises(ToolBusy, match="'t' is busy"):
                async with gate.turn(3.0):
                    pass
            assert (clock(), gate.in_line) == (3.0, 0)
        assert gate.in_flight == 0

    simulate(main())


def test_a_tool_that_becomes_slow_under_load_gets_fewer_calls() -> None:
    async def main() -> None:
        congestion = Congestion(floor=4, ceiling=400, start=400, clock=clock)
        worker = asyncio.Semaphore(16)

        async def life() -> None:
            async with congestion.tool("slow") as turn:
                began = clock()
                async with worker:
                    await asyncio.sleep(0.1)
                turn.watch(Attempted(200, clock() - began))

        await traffic(congestion, [life] * 12, 30)
        assert congestion.describe()["tools"] == {}
        await traffic(congestion, [life] * 300, 60)
        assert 12 <= congestion._gate("slow").limit <= 80
        assert "3 times as long" in congestion.describe()["tools"]["slow"]["why"]

    simulate(main())


def test_long_tails_alone_are_no_congestion() -> None:
    async def main() -> None:
        congestion, rng = Congestion(floor=4, ceiling=400, start=400, clock=clock), random.Random(7)

        async def life() -> None:
            async with congestion.tool("tail") as turn:
                began = clock()
                await asyncio.sleep(rng.lognormvariate(-1.0, 1.45))
                turn.watch(Attempted(200, clock() - began))

        for crowd in (20, 300, 50, 300):
            await traffic(congestion, [life] * crowd, 120)
        assert congestion.describe()["tools"] == {}

    simulate(main())


@pytest.mark.parametrize(("seconds", "limit"), [(0.3, 70), (2.0, 512)])
def test_a_late_event_loop_lowers_calls_that_wait_for_it_alone(seconds: float, limit: int) -> None:
    async def main() -> None:
        congestion = Congestion(floor=4, ceiling=400, clock=clock)

        async def life() -> None:
            async with congestion.tool("t") as turn:
                await asyncio.sleep(seconds)
                turn.watch(Attempted(200, seconds))

        await traffic(congestion, [life] * 40, 10)
        gate = congestion._gate("t")
        gate.in_flight = 100
        congestion.observe_loop(0.01)
        assert gate.limit == 512
        congestion.observe_loop(0.1)
        assert gate.limit == limit

    simulate(main())
