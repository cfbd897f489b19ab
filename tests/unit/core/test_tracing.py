from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags

from app.core import tracing

TRACE_ID, SPAN_ID = 0xABCDEF0123456789ABCDEF0123456789, 0x0123456789ABCDEF


class Recorder(trace.Tracer):
    """As much of an SDK as these tests need: every span is sampled and under one trace."""

    def __init__(self) -> None:
        self.started: list[tuple[str, Mapping[str, Any]]] = []

    def start_span(self, name: str, *args: Any, **kwargs: Any) -> Span:
        raise NotImplementedError

    @contextmanager
    def start_as_current_span(  # type: ignore[override]
        self, name: str, *, kind: SpanKind = SpanKind.INTERNAL, attributes: Mapping[str, Any] | None = None
    ) -> Iterator[Span]:
        self.started.append((name, attributes or {}))
        here = SpanContext(TRACE_ID, SPAN_ID, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
        with trace.use_span(NonRecordingSpan(here)) as span:
            yield span


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(tracing, "_tracer", made)
    return made


def test_without_an_sdk_nothing_is_added_to_a_request() -> None:
    headers: dict[str, str] = {}
    with tracing.rollout("trace-1", job_id="ftjob-1", step=3, split="train"):
        tracing.inject(headers)
    assert headers == {}


def test_a_request_inside_a_span_names_it_as_its_parent(recorder: Recorder) -> None:
    headers: dict[str, str] = {}
    with tracing.tool("search", "call_1"):
        tracing.inject(headers)
    assert headers == {"traceparent": "00-abcdef0123456789abcdef0123456789-0123456789abcdef-01"}


def test_a_rollout_can_be_found_by_its_own_trace_id(recorder: Recorder) -> None:
    with tracing.rollout("trace-1", job_id="ftjob-1", step=3, split="train"):
        pass
    ((name, attributes),) = recorder.started
    assert (name, attributes["hone.trace.id"], attributes["hone.job.id"]) == ("invoke_agent", "trace-1", "ftjob-1")
