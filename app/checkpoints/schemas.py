"""A checkpoint as a client sees it (contract §9.1).

Does not cover: what is in its directory (`store`).
"""

from __future__ import annotations

from typing import Any

from app.db.tables import Checkpoint


def checkpoint_object(checkpoint: Checkpoint) -> dict[str, Any]:
    """`fine_tuning.job.checkpoint`; `metrics.step` is always there because the SDK's type has it."""
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(checkpoint.created_at),
        "fine_tuning_job_id": checkpoint.job_id,
        "fine_tuned_model_checkpoint": checkpoint.name,
        "step_number": checkpoint.step,
        "metrics": {"step": checkpoint.step, **checkpoint.metrics},
    }
