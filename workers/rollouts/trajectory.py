"""One trajectory: sample a turn, run its tools, extend the token history, until it ends; then grade it.

Does not cover: how many run at once (`pool`), what is trained (`batch`), where requests go (`workers.sampler.policy`).

Token history is what the engine saw: a turn extends the previous ids by a bridge, nothing is rendered again (design
§4.4). A wrong, invalid or cut answer is experience and is graded; an infrastructure fault ends the rollout with a state
and never with a reward. Nothing is sampled twice into one rollout: a turn that failed at the sampler is asked again
whole.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from app.core.ids import new_id
from app.core.states import RolloutState
from app.graders.base import Grade, Grader, GraderFailed, InvalidScore
from app.graders.sample import sample_of_messages
from app.net.clients import HttpClient
from app.rendering.protocol import ChatRenderer, ParsedCall, ParsedTurn, RenderingError
from app.samplers.client import Completion
from app.samplers.errors import SamplerError
from app.tools.http import CallContext, FunctionCall, ToolEndpoint, ToolFailed, call_tool
from workers.rollouts.types import Ended, Limits, RolloutKey, Row, StopReason, ToolRecord, Trajectory


@dataclass(frozen=True)
class TurnRequest:
    """What a policy is asked for: one assistant message at one version."""

    version: int
    prompt_ids: Sequence[int]
    max_tokens: int
    temperature: float
    stop_token_ids: Sequence[int]
    stop: Sequence[str]
    request_id: str
    deadline: float  # monotonic


class Policy(Protocol):
    """Where turns come from; retries on infrastructure faults until the deadline, then raises `SamplerError`."""

    async def turn(self, request: TurnRequest) -> Completion: ...


@dataclass(frozen=True)
class Setting:
    """Everything a trajectory needs and shares with all others of the job."""

    job_id: str
    renderer: ChatRenderer
    policy: Policy
    http: HttpClient
    endpoints: Mapping[str, ToolEndpoint]
    grader: Grader
    limits: Limits
    executor: Executor  # rendering and parsing: never on the event loop


class _Stop(Exception):
    """Ends the episode from inside a turn; the trajectory is graded as it stands."""

    def __init__(self, reason: StopReason) -> None:
        self.reason = reason


async def run_rollout(setting: Setting, key: RolloutKey, row: Row, trajectory: Trajectory) -> Ended:
    """The whole life of one rollout, bounded by `rollout_timeout_s`. Raises only our own bugs and cancellation."""
    deadline = time.monotonic() + setting.limits.rollout_timeout_s
    context = CallContext(trace_id=key.id, item=row.item, job_id=setting.job_id, step=key.step, split=key.split)
    try:
        await _episode(setting, key, row, trajectory, context, deadline)
        grade = await _grade(setting, trajectory, context, deadline)
    except ToolFailed as error:
        return _failed(key, trajectory, RolloutState.TOOL_FAILED, str(error))
    except GraderFailed as error:
        return _failed(key, trajectory, RolloutState.GRADER_FAILED, str(error))
    except InvalidScore as error:
        return _failed(key, trajectory, RolloutState.INVALID_SCORE, str(error))
    except SamplerError as error:
        return _failed(key, trajectory, RolloutState.SAMPLER_FAILED, f"{type(error).__name__}: {error}")
    trajectory.activity = "done"
    return Ended(key, trajectory, grade, None)


async def _episode(
    setting: Setting, key: RolloutKey, row: Row, trajectory: Trajectory, context: CallContext, deadline: float
) -> None:
    loop = asyncio.get_running_loop()
    with _doing(trajectory, "rendering"):
        prompt = await loop.run_in_executor(
            setting.executor, setting.renderer.prompt, list(row.messages), list(row.tools) or None
        )
    _extend(trajectory, prompt)
    trajectory.prompt_tokens = len(prompt)
    try:
        for turn in range(setting.limits.max_steps):
            parsed, completion = await _turn(setting, key, row, trajectory, turn, deadline)
            valid = [call for call in parsed.calls if call.error is None]
            trajectory.malformed_calls += len(parsed.calls) - len(valid)
            calls = [_function_call(call) for call in valid]
            trajectory.messages.append(_assistant_message(parsed, calls))
            if completion.finish_reason == "length":
                raise _Stop(StopReason.LENGTH)
            if not calls:
                raise _Stop(StopReason.INVALID_CALL if parsed.calls else StopReason.FINAL)
            if turn == setting.limits.max_steps - 1:
                raise _Stop(StopReason.MAX_STEPS)
            results = await _run_tools(setting, row, trajectory, calls, context, deadline)
            trajectory.messages.extend(results)
            await _bridge(setting, row, trajectory, completion.token_ids, results)
    except _Stop as stop:
        trajectory.stop_reason = stop.reason


async def _turn(
    setting: Setting, key: RolloutKey, row: Row, trajectory: Trajectory, turn: int, deadline: float
) -> tuple[ParsedTurn, Completion]:
    """Sample one assistant message and append it."""
    limits = setting.limits
    room = limits.context - len(trajectory.ids)
    left = limits.max_tokens_per_episode - trajectory.completion_tokens
    if room < 1:
        raise _Stop(StopReason.CONTEXT)
    if left < 1:
        raise _Stop(StopReason.TOKEN_BUDGET)
    request = TurnRequest(
        version=key.version,
        prompt_ids=tuple(trajectory.ids),
        max_tokens=min(limits.max_tokens_per_turn, room, left),
        temperature=0.0 if key.greedy else 1.0,
        stop_token_ids=setting.renderer.stop_token_ids,
        stop=setting.renderer.stop_strings(parallel=row.parallel) if row.tools else (),
        request_id=f"{key.id}-{turn}",
        deadline=deadline,
    )
    began = time.monotonic()
    with _doing(trajectory, f"sampling turn {turn + 1}", "sampling"):
        completion = await setting.policy.turn(request)
    before = list(trajectory.ids)
    _extend(trajectory, completion.token_ids, completion.log_probs)
    trajectory.turns.append(
        {
            "model": completion.model,
            "version": key.version,
            "prompt_tokens": len(before),
            "completion_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "seconds": round(time.monotonic() - began, 4),
        }
    )
    parsed = await asyncio.get_running_loop().run_in_executor(
        setting.executor, setting.renderer.parse, completion.token_ids, list(row.tools) or None, before
    )
    return parsed, completion


async def _run_tools(
    setting: Setting,
    row: Row,
    trajectory: Trajectory,
    calls: Sequence[FunctionCall],
    context: CallContext,
    deadline: float,
) -> list[dict[str, Any]]:
    """All calls of one message at once; results in the order of the calls. Raises `ToolFailed`."""
    offered = {tool["function"]["name"] for tool in row.tools}

    async def one(call: FunctionCall) -> ToolRecord:
        endpoint = setting.endpoints.get(call.name) if call.name in offered else None
        if endpoint is None:
            trajectory.unknown_calls += 1
            text = f"error: unknown tool {call.name!r}"
            return ToolRecord(call.call_id, call.name, call.arguments, text, 404, 0, 0.0, True)
        outcome = await call_tool(
            setting.http, endpoint, call, context, timeout_s=setting.limits.tool_timeout_s, deadline=deadline
        )
        return ToolRecord(
            call.call_id,
            call.name,
            call.arguments,
            outcome.output,
            outcome.status,
            outcome.attempts,
            outcome.seconds,
            outcome.is_error,
        )

    names = ", ".join(sorted({call.name for call in calls}))
    with _doing(trajectory, f"waiting for tool {names}", "tools"):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_unwrapped(one(call))) for call in calls]
    records = [task.result() for task in tasks]
    for record in records:
        if isinstance(record, ToolFailed):
            raise record
    done = [record for record in records if isinstance(record, ToolRecord)]
    trajectory.tools.extend(done)
    return [{"role": "tool", "tool_call_id": r.call_id, "name": r.name, "content": r.output} for r in done]


async def _unwrapped(call: Any) -> ToolRecord | ToolFailed:
    """A failure as a value: one failed call must not cancel its siblings half-way through the user's server."""
    try:
        record: ToolRecord = await call
        return record
    except ToolFailed as error:
        return error


async def _bridge(
    setting: Setting,
    row: Row,
    trajectory: Trajectory,
    completion_ids: Sequence[int],
    results: Sequence[Mapping[str, Any]],
) -> None:
    """Extend the history by the tool results and the next turn's opening; none of it is trained on."""
    split = len(trajectory.ids) - len(completion_ids)
    prompt, said = trajectory.ids[:split], trajectory.ids[split:]
    bridged = await asyncio.get_running_loop().run_in_executor(
        setting.executor, setting.renderer.bridge, prompt, said, list(results), list(row.tools) or None
    )
    if bridged is None or bridged[: len(trajectory.ids)] != trajectory.ids:
        raise _Stop(StopReason.NO_BRIDGE)
    _extend(trajectory, bridged[len(trajectory.ids) :])


async def _grade(setting: Setting, trajectory: Trajectory, context: CallContext, deadline: float) -> Grade:
    reason = trajectory.stop_reason
    finish = "tool_calls" if reason is StopReason.MAX_STEPS else "length" if trajectory.truncated else "stop"
    sample = sample_of_messages(trajectory.messages, finish_reason=finish)
    with _doing(trajectory, "waiting for the grader", "grading"):
        return await setting.grader.grade(sample, context.item, context, deadline=deadline)


def _extend(trajectory: Trajectory, ids: Sequence[int], log_probs: Sequence[float] | None = None) -> None:
    """Append ids; with log-probs they were sampled (mask 1), without they were given (mask 0)."""
    trajectory.ids.extend(ids)
    trajectory.mask.extend([0 if log_probs is None else 1] * len(ids))
    trajectory.log_probs.extend([0.0] * len(ids) if log_probs is None else log_probs)


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
    return Ended(key, trajectory, None, state, error[:2000])


@contextmanager
def _doing(trajectory: Trajectory, activity: str, phase: str | None = None) -> Any:
    """Say what the trajectory is doing, and add the time to its phase."""
    began = time.monotonic()
    trajectory.activity, trajectory.activity_since = activity, began
    try:
        yield
    finally:
        if phase is not None:
            trajectory.seconds[phase] += time.monotonic() - began


__all__ = ["Policy", "RenderingError", "Setting", "TurnRequest", "run_rollout"]
