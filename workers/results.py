"""The result file of a finished job: one CSV line a step, made of the metrics events (contract §9.2).

Does not cover: registering it (`workers.registry`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any

from app.core.ids import new_id
from app.files.storage import Storage, Stored

FILENAME = "step_metrics.csv"
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


def write_result_file(storage: Storage, text: str) -> tuple[str, Stored]:
    """Write the bytes under a new file id, which no row knows yet. Blocking."""
    file_id = new_id("file-")
    return file_id, storage.put(file_id, text.encode())
