"""One trajectory: sample a turn, run its tools, extend the token history, until it ends; then grade it.

Does not cover: how many run at once (`pool`), what is trained (`batch`), where requests go (`workers.sampler.policy`).

Token history is what the engine saw: a turn extends the previous ids by a bridge (design §4.4). Where a format cannot,
the whole history is rendered afresh as a new root of the call tree (`calls`); what was sampled before stays as it was
and is trained where it was sampled. A wrong, invalid or cut answer is experience and is graded; an infrastructure fault
ends the rollout with a state and never with a reward. Nothing is sampled twice into one rollout: a turn that failed at
the sampler is asked again whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from app.core import tracing
from app.core.ids import new_id
from app.core.logging import bound
from app.core.states import RolloutState
from app.graders.base import Grade, GraderFailed, InvalidScore
from app.graders.sample import sample_of_messages
from app.rendering.protocol import ChatRenderer, Message, ParsedCall, ParsedTurn, RenderingError, Tool
from app.samplers.errors import SamplerError
from app.tools.http import CallContext, FunctionCall, ToolFailed
from workers.rollouts.calls import TokenDrift
from workers.rollouts.setting import Policy, Setting, TurnRequest
from workers.rollouts.tools import run_tools
from workers.rollouts.types import Ended, RolloutKey, Row, StopReason, Trajectory

log = logging.getLogger("hone.rollouts")

R = TypeVar("R")


class _Stop(Exception):
    """Ends the episode from inside a turn; the trajectory is graded as it stands."""

    def __init__(self, reason: StopReason) -> None:
        self.reason = reason


async def run_rollout(setting: Setting, key: RolloutKey, row: Row, trajectory: Trajectory) -> Ended:
    """The whole life of one rollout, bounded by `rollout_timeout_s`. Raises only our own bugs and cancellation."""
    deadline = time.monotonic() + setting.limits.rollout_timeout_s
    context = CallContext(trace_id=key.id, item=row.item, job_id=setting.job_id, step=key.step, split=key.split)
    with bound(trace_id=key.id), tracing.rollout(key.id, job_id=context.job_id, step=key.step, split=key.split) as span:
        ended = await _ended(setting, key, row, trajectory, context, deadline)
        if ended.state is not None:
            span.set_attribute("error.type", ended.state)
        return ended


async def _ended(
    setting: Setting, key: RolloutKey, row: Row, trajectory: Trajectory, context: CallContext, deadline: float
) -> Ended:
    try:
        await _episode(setting, key, row, trajectory, context, deadline)
        trajectory.tree.verify()
        grade = await _grade(setting, trajectory, context, deadline)
    except ToolFailed as error:
        return _failed(key, trajectory, RolloutState.TOOL_FAILED, str(error))
    except GraderFailed as error:
        return _failed(key, trajectory, RolloutState.GRADER_FAILED, str(error))
    except InvalidScore as error:
        return _failed(key, trajectory, RolloutState.INVALID_SCORE, str(error))
    except TokenDrift as error:
        trajectory.drifted = True
        return _failed(key, trajectory, RolloutState.SAMPLER_FAILED, f"token drift: {error}")
    except SamplerError as error:
        return _failed(key, trajectory, RolloutState.SAMPLER_FAILED, f"{type(error).__name__}: {error}")
    trajectory.activity = "done"
    return Ended(key, trajectory, grade, None)


async def _episode(
    setting: Setting, key: RolloutKey, row: Row, trajectory: Trajectory, context: CallContext, deadline: float
) -> None:
    tools = list(row.tools) or None
    with _doing(trajectory, "rendering", "rendering"):
        prompt = await _off_loop(setting, _rendered, setting.renderer, row.messages, tools)
    trajectory.tree.restart(prompt)
    trajectory.prompt_tokens = len(prompt)
    del prompt  # the tree has its own; 6 KiB that this frame would hold to the end
    try:
        for turn in range(setting.limits.max_steps):
            calls = await _turn(setting, key, row, trajectory, turn, deadline)
            if turn == setting.limits.max_steps - 1:
                raise _Stop(StopReason.MAX_STEPS)
            results = await _call_tools(setting, row, trajectory, calls, context, deadline)
            trajectory.messages.extend(results)
            await _continue(setting, row, trajectory, results)
    except _Stop as stop:
        trajectory.stop_reason = stop.reason


async def _turn(
    setting: Setting, key: RolloutKey, row: Row, trajectory: Trajectory, turn: int, deadline: float
) -> list[FunctionCall]:
    """Sample one assistant message and append it; its readable calls. Ends the episode when there are none."""
    limits, tree = setting.limits, trajectory.tree
    room = limits.context - len(tree.current.ids)
    left = limits.max_tokens_per_episode - tree.sampled
    if room < 1:
        raise _Stop(StopReason.CONTEXT)
    if left < 1:
        raise _Stop(StopReason.TOKEN_BUDGET)
    request = TurnRequest(
        version=key.version,
        prompt_ids=tree.current.ids[:],
        max_tokens=min(limits.max_tokens_per_turn, room, left),
        temperature=0.0 if key.greedy else 1.0,
        stop_token_ids=setting.renderer.stop_token_ids,
        stop=setting.renderer.stop_strings(parallel=row.parallel) if row.tools else (),
        request_id=f"{key.id}-{turn}",
        deadline=deadline,
    )
    began = time.monotonic()
    with (
        _doing(trajectory, f"sampling turn {turn + 1}", "sampling"),
        tracing.turn(key.version, len(request.prompt_ids)),
    ):
        completion = await setting.policy.turn(request)
    tree.record(
        request.prompt_ids,
        completion.token_ids,
        completion.log_probs,
        model=completion.model,
        version=key.version,
        sampler=completion.sampler,
        finish_reason=completion.finish_reason,
        seconds=time.monotonic() - began,
    )
    with _doing(trajectory, "reading the turn", "rendering"):
        parsed = await _off_loop(
            setting, setting.renderer.parse, completion.token_ids, list(row.tools) or None, request.prompt_ids
        )
    valid = [call for call in parsed.calls if call.error is None]
    trajectory.malformed_calls += len(parsed.calls) - len(valid)
    calls = [_function_call(call) for call in valid]
    trajectory.messages.append(_assistant_message(parsed, calls))
    if completion.finish_reason == "length":
        raise _Stop(StopReason.LENGTH)
    if not calls:
        raise _Stop(StopReason.INVALID_CALL if parsed.calls else StopReason.FINAL)
    return calls


async def _call_tools(
    setting: Setting,
    row: Row,
    trajectory: Trajectory,
    calls: Sequence[FunctionCall],
    context: CallContext,
    deadline: float,
) -> list[dict[str, Any]]:
    """The messages that answer the calls, in their order. Raises `ToolFailed`."""
    offered = {tool["function"]["name"] for tool in row.tools}
    with _doing(trajectory, f"waiting for tool {', '.join(sorted({call.name for call in calls}))}"):
        run = await run_tools(setting, offered, calls, context, deadline)
    # Calls of one message run side by side: what made it wait is the call that ended last.
    trajectory.seconds["tool_queue"] += run.queued_s
    trajectory.seconds["tools"] += max(0.0, run.wall_s - run.queued_s)
    trajectory.tools.extend(run.records)
    trajectory.unknown_calls += run.unknown
    if run.failed is not None:
        raise run.failed
    return [{"role": "tool", "tool_call_id": r.call_id, "name": r.name, "content": r.output} for r in run.records]


async def _continue(setting: Setting, row: Row, trajectory: Trajectory, results: Sequence[Mapping[str, Any]]) -> None:
    """Extend the ids by the results and the next turn's opening; if the format cannot, render the history afresh."""
    tree, tools = trajectory.tree, list(row.tools) or None
    with _doing(trajectory, "rendering", "rendering"):
        tail = await _off_loop(
            setting, _bridged, setting.renderer, tree.current.ids, tree.calls[-1].start, list(results), tools
        )
        if tail is not None:
            tree.current.give(tail)
            return
        trajectory.bridge_breaks += 1
        try:
            prompt = await _off_loop(setting, _rendered, setting.renderer, [*row.messages, *trajectory.messages], tools)
        except RenderingError:
            raise _Stop(StopReason.NO_BRIDGE) from None
    tree.restart(prompt)


def _rendered(renderer: ChatRenderer, messages: Sequence[Message], tools: Sequence[Tool] | None) -> array[int]:
    return array("i", renderer.prompt(list(messages), tools))


def _bridged(
    renderer: ChatRenderer, ids: array[int], start: int, results: Sequence[Message], tools: Sequence[Tool] | None
) -> array[int] | None:
    """What follows `ids` in the next prompt; None when the bridge does not hold or would change an id."""
    found = renderer.bridge(ids[:start], ids[start:], results, tools)
    if found is None:
        return None
    whole = array("i", found)
    return whole[len(ids) :] if len(whole) > len(ids) and whole[: len(ids)] == ids else None


async def _off_loop(setting: Setting, function: Callable[..., R], *arguments: Any) -> R:
    return await asyncio.get_running_loop().run_in_executor(setting.executor, function, *arguments)


async def _grade(setting: Setting, trajectory: Trajectory, context: CallContext, deadline: float) -> Grade:
    reason = trajectory.stop_reason
    finish = "tool_calls" if reason is StopReason.MAX_STEPS else "length" if trajectory.truncated else "stop"
    sample = sample_of_messages(trajectory.messages, finish_reason=finish, wants_json=setting.wants_json)
    with _doing(trajectory, "waiting for the grader", "grading"), tracing.grade():
        return await setting.grader.grade(sample, context.item, context, deadline=deadline)


def _function_call(call: ParsedCall) -> FunctionCall:
    return FunctionCall(id=new_id("fc_"), call_id=new_id("call_"), name=call.name or "", arguments=call.arguments)


def _assistant_message(parsed: ParsedTurn, calls: Sequence[FunctionCall]) -> dict[str, Any]:
    """As chat completions would show it; a call that could not be read stays visible as text."""
    broken = [call.raw for call in parsed.calls if call.error is not None]
    content = "\n".join(part for part in (parsed.content, *broken) if part)
    message: dict[str, Any] = {"role": "assistant", "content": content or None}
    if parsed.reasoning:
        message["reasoning_content"] = parsed.reasoning
    if calls:
        message["tool_calls"] = [
            {"id": c.call_id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in calls
        ]
    return message


def _failed(key: RolloutKey, trajectory: Trajectory, state: RolloutState, error: str) -> Ended:
    trajectory.activity = "failed"
    log.info("discarded as %s: %s", state, error)
    return Ended(key, trajectory, None, state, error[:2000])


@contextmanager
def _doing(trajectory: Trajectory, activity: str, phase: str | None = None) -> Iterator[None]:
    """Say what the trajectory is doing, and add the time to its phase."""
    began = time.monotonic()
    trajectory.activity, trajectory.activity_since = activity, began
    try:
        yield
    finally:
        if phase is not None:
            trajectory.seconds[phase] += time.monotonic() - began


__all__ = ["Policy", "RenderingError", "Setting", "TurnRequest", "run_rollout"]
