"""A rollout as a client sees it, and the filters of the list.

Does not cover: the trace's own content (`workers.rollouts`), which is passed on as it was written.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.core.states import RolloutState
from app.db.tables import Rollout

MAX_INT = 2**31 - 1  # of a column


class RolloutQuery(BaseModel):
    """Query parameters of the list; all that are given must hold."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    after: str | None = None
    limit: int = Field(20, ge=1, le=1000)
    order: Literal["asc", "desc"] = "desc"
    step: int | None = Field(None, ge=0, le=MAX_INT)
    split: Literal["train", "valid"] | None = None
    state: RolloutState | None = None
    greedy: bool | None = None
    row: int | None = Field(None, ge=0, le=MAX_INT)
    min_reward: float | None = Field(None, allow_inf_nan=False)
    max_reward: float | None = Field(None, allow_inf_nan=False)
    tool_error: bool | None = Field(
        None, description="true: a tool failed for good or the model made an invalid call; false: neither."
    )


class RolloutObject(BaseModel):
    """The row of the ledger; the id is the trace id that tools and grader were sent."""

    id: str
    object: Literal["fine_tuning.job.rollout"] = "fine_tuning.job.rollout"
    fine_tuning_job_id: str
    attempt: int
    step: int = Field(description="The training step it is for; for validation the step just finished.")
    split: Literal["train", "valid"]
    greedy: bool
    row: int = Field(description="0-based line of the dataset file.")
    group: int = Field(description="Siblings share it; unique within an attempt.")
    sample: int
    version: int = Field(description="Policy version that served every turn.")
    state: RolloutState
    reward: float | None
    advantage: float | None
    sub_scores: dict[str, Any] | None
    stop_reason: str | None
    truncated: bool
    turns: int
    tool_calls: int
    invalid_calls: int
    completion_tokens: int
    prompt_tokens: int
    error: str | None
    seconds: dict[str, Any] | None
    started_at: int
    finished_at: int | None
    has_trace: bool

    @classmethod
    def of(cls, row: Rollout) -> RolloutObject:
        return cls.model_validate(_values(row))


class RolloutWithTrace(RolloutObject):
    """One rollout and all that was recorded of it; `trace_error` says why a finished one has no trace any more."""

    trace: dict[str, Any] | None = Field(
        description="`messages`; `tokens` (`ids`, `mask` 1 = sampled, `log_probs`), all segments joined; `segments`: "
        "the parts of `tokens` that are one training row each, and the turn whose ids it begins with (`parent`, null: "
        "a root); `turns`: the `version`, `model` and `sampler` that served tokens `start` to `end` of their `segment`;"
        " `tool_calls`; `grade`."
    )
    trace_error: str | None

    @classmethod
    def around(cls, row: Rollout, trace: dict[str, Any] | None, trace_error: str | None = None) -> RolloutWithTrace:
        return cls.model_validate({**_values(row), "trace": trace, "trace_error": trace_error})


class RolloutList(BaseModel):
    """A page of rollouts."""

    object: Literal["list"] = "list"
    data: list[RolloutObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


def _values(row: Rollout) -> dict[str, Any]:
    same = RolloutObject.model_fields.keys() & {column.key for column in Rollout.__table__.columns}
    return {
        **{name: getattr(row, name) for name in same},
        "fine_tuning_job_id": row.job_id,
        "started_at": int(row.started_at),
        "finished_at": None if row.finished_at is None else int(row.finished_at),
        "has_trace": row.trace_file is not None,
    }
