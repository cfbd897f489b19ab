"""The result file of a finished job: one CSV line a step, made of the metrics events (contract §9.2).

Does not cover: registering it (`workers.registry`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any

from app.core.ids import new_id
from app.db.tables import File
from app.files.storage import Storage

COLUMNS = (
    "step",
    "train_mean_reward",
    "full_valid_mean_reward",
    "completion_tokens_mean",
    "mean_unresponsive_rewards",
    "tool_calls_mean",
    "sampling_duration",
    "training_duration",
    "eval_duration",
    "total_duration",
)


def table(history: Iterable[dict[str, Any]]) -> str:
    """CSV text; several events of one step make one line, later ones win; empty cells where nothing was measured."""
    steps: dict[int, dict[str, Any]] = {}
    for data in history:
        timing = data.get("timing", {}).get("step", {})
        flat = {name: data.get(name) for name in COLUMNS}
        flat |= {
            "sampling_duration": timing.get("sampling"),
            "training_duration": timing.get("training"),
            "eval_duration": timing.get("eval"),
            "total_duration": timing.get("full_iteration"),
        }
        steps.setdefault(data["step"], {}).update({k: v for k, v in flat.items() if v is not None})
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="")
    writer.writeheader()
    writer.writerows(steps[step] for step in sorted(steps))
    return out.getvalue()


def write_result_file(storage: Storage, project_id: str, text: str) -> File:
    """Write the bytes under a new file id; the returned row is not yet in the database. Blocking."""
    file_id = new_id("file-")
    stored = storage.put(file_id, text.encode())
    return File(
        id=file_id,
        project_id=project_id,
        filename="step_metrics.csv",
        purpose="fine-tune-results",
        bytes=stored.bytes,
        sha256=stored.sha256,
        status="processed",
        status_details=None,
        created_at=0.0,
        expires_at=None,
    )
