"""What every grader kind has in common: the sample it judges, the grade it gives, and how it can fail.

Does not cover: any kind itself. A kind is a module with a `GraderSpec` (wire) and a `Grader`, and a line in `build`.

    GraderFailed   infrastructure: after retries, the rollout is discarded (`grader_failed`)
    InvalidScore   the grader answered, but not with a finite number (`invalid_score`)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field

from app.net.clients import HttpClient
from app.net.endpoint import Mask
from app.net.exchange import Retry
from app.tools.http import CallContext

Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Sample:
    """The model's side of one rollout, in the shape of the `sample` namespace (contract §5.1).

    `output_tools` holds every tool call of the trajectory, `choices` the final message as chat completions show it.
    """

    output_text: str
    output_json: Any | None
    output_tools: Sequence[Mapping[str, Any]]
    choices: Sequence[Mapping[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """The wire form that graders are sent and templates look into."""
        return {
            "output_text": self.output_text,
            "output_json": self.output_json,
            "output_tools": list(self.output_tools),
            "choices": list(self.choices),
        }


@dataclass(frozen=True)
class Grade:
    """A finite score. `extra` is whatever else the grader said: recorded in the trace, never used."""

    score: float
    sub_scores: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    attempts: int = 1
    reason: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class GraderFailed(Exception):
    """No answer that could be read as one, after all attempts. Its text holds no header value."""

    def __init__(self, grader: str, url: str, attempts: int, last_error: str) -> None:
        self.grader = grader
        self.url = url
        self.attempts = attempts
        self.last_error = last_error
        super().__init__(f"grader {grader!r} at {url} failed after {attempts} attempt(s): {last_error}")


class InvalidScore(Exception):
    """The grader gave no finite number: missing, of another type, NaN, or a formula without a value."""

    def __init__(self, grader: str, reason: str) -> None:
        self.grader = grader
        self.reason = reason
        super().__init__(f"grader {grader!r}: {reason}")


class Grader(Protocol):
    """Judges one rollout."""

    async def grade(
        self, sample: Sample, item: Mapping[str, Any], context: CallContext, *, deadline: float | None = None
    ) -> Grade:
        """The grade, by `deadline` (time.monotonic()). Raises GraderFailed or InvalidScore."""


@dataclass(frozen=True)
class Workshop:
    """What a spec may need to build its grader. timeout_s bounds one attempt; `mask` knows the job's secrets."""

    http: HttpClient
    timeout_s: float
    retry: Retry = field(default_factory=Retry)
    mask: Mask = field(default_factory=Mask)


ParsePart = Callable[[object, str], "GraderSpec"]


class GraderSpec(BaseModel, ABC):
    """The wire form of one grader; unknown fields are refused. `type` is the kind's name.

    `pass_threshold` feeds the pass rate of the metrics and leaves the reward alone (contract §5.9).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    # Fields that hold templates; every placeholder of theirs is checked at create and against every row.
    template_fields: ClassVar[tuple[str, ...]] = ()

    type: str
    name: Annotated[str, Field(min_length=1, max_length=64)]
    pass_threshold: Finite | None = None

    @classmethod
    def prepare(cls, fields: dict[str, Any], where: str, parse_part: ParsePart) -> dict[str, Any]:
        """Bring aliases into canonical form before validation. Raises InvalidRequest; `where` is the grader's path."""
        return fields

    @abstractmethod
    def build(self, workshop: Workshop) -> Grader:
        """The grader that this describes."""

    def secrets(self) -> list[Mapping[str, str]]:
        """The headers that this grader and its parts send."""
        return []

    def templates(self) -> dict[str, str]:
        """Path below this grader → template text."""
        return {path: str(getattr(self, path)) for path in self.template_fields}
