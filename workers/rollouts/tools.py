"""The tool calls of one message: all at once, each behind its tool's gate, results in the order of the calls.

Does not cover: one HTTP call with its retries (`app.tools.http`), and how many may run (`congestion`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from app.core import tracing
from app.tools.http import CallContext, FunctionCall, ToolEndpoint, ToolFailed, call_tool
from workers.rollouts.setting import Setting
from workers.rollouts.tool_gate import ToolBusy
from workers.rollouts.types import ToolRecord

NO_ANSWER = 0  # the status of a call that nobody answered in time


@dataclass(frozen=True)
class ToolRun:
    """What came of a message's calls. `failed`: an infrastructure fault, which discards the rollout."""

    records: list[ToolRecord]
    failed: ToolFailed | None
    unknown: int
    queued_s: float  # how long the call that ended last had waited for its gate
    wall_s: float


async def run_tools(
    setting: Setting, offered: set[str], calls: Sequence[FunctionCall], context: CallContext, deadline: float
) -> ToolRun:
    """Never raises for a tool: one failed call must not cancel its siblings half-way through the user's server."""
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_one(setting, offered, call, context, deadline)) for call in calls]
    ended = [task.result() for task in tasks]
    last = max((record for record, _ in ended), key=lambda record: record.queued_s + record.seconds)
    return ToolRun(
        records=[record for record, failure in ended if failure is None],
        failed=next((failure for _, failure in ended if failure is not None), None),
        unknown=sum(_endpoint(setting, offered, call) is None for call in calls),
        queued_s=last.queued_s,
        wall_s=time.monotonic() - began,
    )


def _endpoint(setting: Setting, offered: set[str], call: FunctionCall) -> ToolEndpoint | None:
    return setting.endpoints.get(call.name) if call.name in offered else None


async def _one(
    setting: Setting, offered: set[str], call: FunctionCall, context: CallContext, deadline: float
) -> tuple[ToolRecord, ToolFailed | None]:
    endpoint = _endpoint(setting, offered, call)
    if endpoint is None:
        text = f"error: unknown tool {call.name!r}"
        return ToolRecord(call.call_id, call.name, call.arguments, text, 404, 0, 0.0, True), None
    began = time.monotonic()
    queued_s, timeout_s = 0.0, setting.limits.tool_timeout_s
    try:
        with tracing.tool(endpoint.name, call.call_id):
            async with setting.gate.tool(endpoint.name, deadline) as turn:
                queued_s = time.monotonic() - began
                outcome = await call_tool(
                    setting.http, endpoint, call, context, timeout_s=timeout_s, deadline=deadline, watch=turn.watch
                )
    except ToolBusy as busy:
        queued_s = time.monotonic() - began
        failure = ToolFailed(endpoint.name, endpoint.server_url, 0, str(busy))
    except ToolFailed as error:
        failure = error
    else:
        record = ToolRecord(
            call.call_id,
            call.name,
            call.arguments,
            outcome.output,
            outcome.status,
            outcome.attempts,
            outcome.seconds,
            outcome.is_error,
            queued_s,
        )
        setting.on_tool(record)
        return record, None
    seconds = time.monotonic() - began - queued_s
    text, attempts = str(failure), failure.attempts
    record = ToolRecord(call.call_id, call.name, call.arguments, text, NO_ANSWER, attempts, seconds, True, queued_s)
    setting.on_tool(record)
    return record, failure
