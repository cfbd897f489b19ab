"""`endpoint`: the user's own grader over HTTP (contract §5.8, §7.5).

Does not cover: retries, caps and the deadline of the exchange itself (`app.net.exchange`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from app.graders.base import Finite, Grade, Grader, GraderFailed, GraderSpec, InvalidScore, Sample, Workshop
from app.graders.rate import RateLimit
from app.net.endpoint import Mask, quote, show_url
from app.net.exchange import MAX_BODY_BYTES, Answer, Unanswered, post_json
from app.tools.http import CallContext, request_headers
from app.tools.schemas import EndpointUrl, SecretHeaders

MAX_EXTRA_BYTES = 64 * 1024  # of the answer; what the trace keeps of a talkative grader


class EndpointSpec(GraderSpec):
    """The wire form. `rate_limit` is in requests a second, retries included."""

    type: Literal["endpoint"]
    url: EndpointUrl
    headers: SecretHeaders = Field(default_factory=dict, repr=False)
    rate_limit: Annotated[Finite, Field(gt=0)] | None = None

    def build(self, workshop: Workshop) -> Grader:
        """A grader with a rate limit of its own."""
        return EndpointGrader(self, workshop)

    def secrets(self) -> list[Mapping[str, str]]:
        """Its headers."""
        return [self.headers]


class EndpointGrader:
    """POSTs `{sample, item, trace_id}` and reads `{"score": number}`."""

    def __init__(self, spec: EndpointSpec, workshop: Workshop) -> None:
        self._spec = spec
        self._workshop = workshop
        self._gate = RateLimit(spec.rate_limit) if spec.rate_limit else None

    async def grade(
        self, sample: Sample, item: Mapping[str, Any], context: CallContext, *, deadline: float | None = None
    ) -> Grade:
        """The endpoint's score; what else it said is recorded. Raises GraderFailed or InvalidScore."""
        spec = self._spec
        payload = {"sample": sample.as_dict(), "item": dict(item), "trace_id": context.trace_id}
        body = json.dumps(payload, ensure_ascii=False).encode("utf-8", "replace")
        if len(body) > MAX_BODY_BYTES:
            raise self._failed(0, f"the request of {len(body)} bytes is larger than 1 MB")
        headers = request_headers(spec.headers, context, f"{context.trace_id}:{spec.name}")
        try:
            answer = await post_json(
                self._workshop.http,
                spec.url,
                body,
                headers,
                timeout_s=self._workshop.timeout_s,
                deadline=deadline,
                retry=self._workshop.retry,
                gate=self._gate,
                mask=self._workshop.mask,
            )
        except Unanswered as error:
            raise self._failed(error.attempts, error.last_error) from None
        return self._read(answer)

    def _read(self, answer: Answer) -> Grade:
        if answer.body is None:
            raise self._failed(answer.attempts, "the answer is larger than 1 MB")
        mask = self._workshop.mask
        said = quote(answer.body, mask | Mask.of(url=self._spec.url))
        if answer.status >= 400:
            raise self._failed(answer.attempts, f"answered {answer.status}: {said}")
        try:
            payload = json.loads(answer.body, parse_constant=_refuse)
        except (ValueError, RecursionError):
            raise InvalidScore(self._spec.name, f"the answer is not JSON: {said}") from None
        if not isinstance(payload, dict) or "score" not in payload:
            raise InvalidScore(self._spec.name, f"the answer has no 'score': {said}")
        score = _number(payload["score"])
        if score is None:
            raise InvalidScore(self._spec.name, f"'score' is not a finite number: {said}")
        parts = payload.get("scores")
        return Grade(
            score=score,
            sub_scores=_numbers(parts, mask) if isinstance(parts, dict) else {},
            seconds=answer.seconds,
            attempts=answer.attempts,
            reason=mask(payload["reason"]) if isinstance(payload.get("reason"), str) else None,
            extra=_extra(payload, len(answer.body), mask),
        )

    def _failed(self, attempts: int, last_error: str) -> GraderFailed:
        return GraderFailed(self._spec.name, show_url(self._spec.url), attempts, last_error)


def _number(value: object) -> float | None:
    """The value as a finite float; None for anything else. A boolean is not a score."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _numbers(parts: Mapping[str, object], mask: Mask) -> dict[str, float]:
    found = {mask(name): _number(value) for name, value in parts.items()}
    return {name: value for name, value in found.items() if value is not None}


def _extra(payload: Mapping[str, Any], size: int, mask: Mask) -> dict[str, Any]:
    if size > MAX_EXTRA_BYTES:
        return {"omitted_bytes": size}
    try:
        return {mask(key): mask.value(value) for key, value in payload.items() if key != "score"}
    except RecursionError:  # as deep as a parser still goes; nobody reads that in a trace
        return {"omitted_bytes": size}


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
