"""The tool calls of one trajectory: together, in order, in their turn, and what a fault of theirs becomes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from app.core.states import RolloutState
from app.net.exchange import Attempted
from tests.unit.rollouts.scripted import (
    LOOKUP,
    ScriptedGrader,
    ScriptedPolicy,
    Tools,
    broken,
    roll,
    row,
    says,
    setting,
    text,
)
from workers.rollouts.tool_gate import ToolBusy, ToolTurn
from workers.rollouts.types import StopReason, ToolRecord


async def test_calls_of_one_message_run_together_and_answer_in_order() -> None:
    both, first_may_go = asyncio.Barrier(2), asyncio.Event()

    async def slow(body: dict[str, Any]) -> tuple[int, Any]:
        await both.wait()  # both are there at once, or this never opens
        await first_may_go.wait()
        return 200, {"output": "slow"}

    async def fast(body: dict[str, Any]) -> tuple[int, Any]:
        await both.wait()
        first_may_go.set()
        return 200, {"output": "fast"}

    where = setting(ScriptedPolicy(["!slow {}|!fast {}", "done"]), tools=Tools(slow=slow, fast=fast))
    found = await asyncio.wait_for(roll(where, row(0, "slow", "fast")), 5)
    assert [record.output for record in found.trajectory.tools] == ["slow", "fast"]
    assert "<tool>slow<tool>fast<assistant>" in text(found.trajectory.ids)


@pytest.mark.parametrize("offered", [("lookup",), ("lookup", "ghost")], ids=["not-offered", "without-endpoint"])
async def test_an_unknown_tool_is_told_to_the_model_and_the_episode_goes_on(offered: tuple[str, ...]) -> None:
    where = setting(ScriptedPolicy(["!ghost {}", "84"]), tools=Tools(lookup=says("31")))
    found = await roll(where, row(0, *offered))
    assert found.trajectory.messages[1]["content"] == "error: unknown tool 'ghost'"
    assert (found.trajectory.invalid_calls, found.trajectory.stop_reason) == (1, StopReason.FINAL)


async def test_a_tool_of_the_job_that_the_row_does_not_offer_is_not_called() -> None:
    tools = Tools(lookup=says("31"), delete=says("gone"))
    found = await roll(setting(ScriptedPolicy(["!delete {}", "84"]), tools=tools), row(0, "lookup"))
    assert tools.seen == []
    assert found.trajectory.invalid_calls == 1


async def test_an_unreadable_call_beside_a_good_one_is_counted_and_the_good_one_is_run() -> None:
    tools = Tools(lookup=says("31"))
    found = await roll(setting(ScriptedPolicy([f"!lookup {{|{LOOKUP}", "84"]), tools=tools), row(0, "lookup"))
    assert (len(tools.seen), found.trajectory.invalid_calls) == (1, 1)
    assert len(found.trajectory.messages[0]["tool_calls"]) == 1
    assert found.trajectory.stop_reason is StopReason.FINAL


async def test_a_4xx_is_shown_to_the_model() -> None:
    where = setting(ScriptedPolicy([LOOKUP, "sorry"]), tools=Tools(lookup=says("no such item", 404)))
    found = await roll(where, row(0, "lookup"))
    assert (found.state, found.reward) == (None, 1.0)
    assert found.trajectory.messages[1]["content"] == "no such item"
    assert (found.trajectory.tools[0].is_error, found.trajectory.tools[0].status) == (True, 404)


async def test_a_failed_tool_discards_the_rollout_and_lets_the_siblings_of_its_turn_finish() -> None:
    finished = []

    async def slow(body: dict[str, Any]) -> tuple[int, Any]:
        await asyncio.sleep(0.05)
        finished.append(body["name"])
        return 200, {"output": "x"}

    grader = ScriptedGrader()
    where = setting(ScriptedPolicy(["!broken {}|!slow {}"]), grader, Tools(broken=broken, slow=slow))
    found = await roll(where, row(0, "broken", "slow"))
    assert (found.state, found.grade) == (RolloutState.TOOL_FAILED, None)
    assert "broken" in (found.error or "")
    assert finished == ["slow"]
    assert grader.seen == []


async def test_waiting_for_leave_to_call_a_tool_is_not_the_tools_time() -> None:
    heard: list[ToolRecord] = []
    attempts: list[Attempted] = []

    class Narrow:
        one = asyncio.Lock()

        @asynccontextmanager
        async def tool(self, name: str, deadline: float | None = None) -> AsyncIterator[ToolTurn]:
            async with self.one:
                yield ToolTurn(attempts.append, 0.0)

    async def slow(body: dict[str, Any]) -> tuple[int, Any]:
        await asyncio.sleep(0.05)
        return 200, {"output": "31"}

    two = f"{LOOKUP}|{LOOKUP}"
    where = setting(ScriptedPolicy([two, "84"]), tools=Tools(lookup=slow), gate=Narrow(), on_tool=heard.append)
    seconds = (await roll(where, row(0, "lookup"))).trajectory.seconds
    assert seconds["tool_queue"] >= 0.05
    assert 0.05 <= seconds["tools"] < seconds["tool_queue"] + seconds["tools"] - 0.04
    assert sorted(record.queued_s > 0.04 for record in heard) == [False, True]
    assert [attempt.status for attempt in attempts] == [200, 200]


async def test_a_tool_without_a_turn_before_the_deadline_is_a_failed_tool() -> None:
    class Closed:
        @asynccontextmanager
        async def tool(self, name: str, deadline: float | None = None) -> AsyncIterator[ToolTurn]:
            assert deadline is not None
            raise ToolBusy(name, 7)
            yield

    heard: list[ToolRecord] = []
    where = setting(ScriptedPolicy([LOOKUP]), tools=Tools(lookup=says("31")), gate=Closed(), on_tool=heard.append)
    found = await roll(where, row(0, "lookup"))
    assert found.state is RolloutState.TOOL_FAILED
    assert "its queue (7 calls)" in (found.error or "")
    assert [(record.status, record.is_error) for record in heard] == [(0, True)]
