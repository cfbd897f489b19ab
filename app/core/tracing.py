"""Spans of what no instrumentation knows: a rollout, its turns, its tool calls, its grade (OpenTelemetry's API).

Does not cover: who exports them. Without an SDK each call here does nothing; `opentelemetry-instrument` before the
command brings one, for every process it starts, and adds spans of HTTP and SQL by itself. Names and attributes follow
the GenAI conventions, which are still in development: they stand in this module only.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import AbstractContextManager

from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind

_tracer = trace.get_tracer("hone")

Spanning = AbstractContextManager[Span]


def rollout(trace_id: str, *, job_id: str, step: int, split: str) -> Spanning:
    """One trajectory with its grade; an exception that leaves it marks the span as failed."""
    return _tracer.start_as_current_span(
        "invoke_agent",
        attributes={
            "gen_ai.operation.name": "invoke_agent",
            "hone.trace.id": trace_id,
            "hone.job.id": job_id,
            "hone.step": step,
            "hone.split": split,
        },
    )


def turn(version: int, prompt_tokens: int) -> Spanning:
    """One request to the sampler, retries included."""
    return _tracer.start_as_current_span(
        "chat",
        kind=SpanKind.CLIENT,
        attributes={
            "gen_ai.operation.name": "chat",
            "gen_ai.usage.input_tokens": prompt_tokens,
            "hone.policy.version": version,
        },
    )


def tool(name: str, call_id: str) -> Spanning:
    """One call of a tool with its retries, the wait for its turn included."""
    return _tracer.start_as_current_span(
        f"execute_tool {name}",
        kind=SpanKind.CLIENT,
        attributes={"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": name, "gen_ai.tool.call.id": call_id},
    )


def grade() -> Spanning:
    """One sample before its grader."""
    return _tracer.start_as_current_span("grade", kind=SpanKind.CLIENT)


def inject(headers: MutableMapping[str, str]) -> None:
    """Add W3C `traceparent`, so that a user's own spans join ours; nothing without a recording span."""
    propagate.inject(headers)
