"""A checkpoint as a client sees it (contract §9.1).

Does not cover: what is in its directory (`store`).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from app.db.tables import Checkpoint


class CheckpointObject(BaseModel):
    """`fine_tuning.job.checkpoint`: its name can be used as a model."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, Any] = Field(description="step, and what was measured at it.")

    @classmethod
    def of(cls, row: Checkpoint) -> CheckpointObject:
        return cls(
            id=row.id,
            created_at=int(row.created_at),
            fine_tuning_job_id=row.job_id,
            fine_tuned_model_checkpoint=row.name,
            step_number=row.step,
            metrics={"step": row.step, **row.metrics},
        )


class CheckpointList(BaseModel):
    """A page of checkpoints."""

    object: Literal["list"] = "list"
    data: list[CheckpointObject]
    has_more: bool
    first_id: str | None
    last_id: str | None
