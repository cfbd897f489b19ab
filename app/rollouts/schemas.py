"""A rollout as a client sees it, and the filters of the list.

Does not cover: the trace's own content (`workers.rollouts`), which is passed on as it was written.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.core.states import RolloutState
from app.db.tables import Rollout

_FIELDS = (
    "attempt",
    "step",
    "split",
    "greedy",
    "row",
    "group",
    "sample",
    "version",
    "state",
    "reward",
    "advantage",
    "sub_scores",
    "stop_reason",
    "truncated",
    "turns",
    "tool_calls",
    "invalid_calls",
    "completion_tokens",
    "prompt_tokens",
    "error",
    "seconds",
)


class RolloutQuery(BaseModel):
    """Query parameters of the list; all that are given must hold."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    after: str | None = None
    limit: int = Field(20, ge=1, le=1000)
    order: Literal["asc", "desc"] = "desc"
    step: int | None = Field(None, ge=0)
    split: Literal["train", "valid"] | None = None
    state: RolloutState | None = None
    greedy: bool | None = None
    row: int | None = Field(None, ge=0)
    min_reward: float | None = Field(None, allow_inf_nan=False)
    max_reward: float | None = Field(None, allow_inf_nan=False)
    tool_error: bool | None = Field(
        None, description="true: a tool failed for good or the model made an invalid call; false: neither."
    )


def rollout_object(rollout: Rollout) -> dict[str, Any]:
    """The row of the ledger; the id is the trace id that tools and grader were sent."""
    return {
        "id": rollout.id,
        "object": "fine_tuning.job.rollout",
        "fine_tuning_job_id": rollout.job_id,
        **{name: getattr(rollout, name) for name in _FIELDS},
        "started_at": int(rollout.started_at),
        "finished_at": None if rollout.finished_at is None else int(rollout.finished_at),
        "has_trace": rollout.trace_file is not None,
    }
