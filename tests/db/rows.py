"""Rows that tests put into a database directly, as the service or a worker would have written them.

Does not cover: making them through the API (`tests/api`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from app.core.ids import new_id, new_trace_id
from app.core.settings import Settings
from app.core.states import RolloutState
from app.db.engine import Database, now
from app.db.tables import DEFAULT_PROJECT, Checkpoint, File, Job, Rollout
from app.files.storage import Storage

GRADER = {
    "type": "string_check",
    "name": "exact",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
METHOD: dict[str, Any] = {
    "type": "reinforcement",
    "reinforcement": {
        "grader": GRADER,
        "hyperparameters": {"n_epochs": "auto", "batch_size": "auto"},
        "response_format": None,
    },
}


def dataset(n: int, start: int = 0) -> bytes:
    """`n` right rows without tools."""
    rows = (
        {"messages": [{"role": "user", "content": f"Say {number}"}], "answer": str(number)}
        for number in range(start, start + n)
    )
    return "\n".join(json.dumps(row) for row in rows).encode()


@dataclass(frozen=True)
class Seed:
    """Inserts and returns ids."""

    database: Database
    settings: Settings

    async def file(self, content: bytes, project_id: str = DEFAULT_PROJECT, purpose: str = "fine-tune") -> str:
        file_id = new_id("file-")
        stored = Storage.of(self.settings).put(file_id, content)
        async with self.database.begin() as session:
            session.add(
                File(
                    id=file_id,
                    project_id=project_id,
                    filename="rows.jsonl",
                    purpose=purpose,
                    bytes=stored.bytes,
                    sha256=stored.sha256,
                    status="processed",
                    created_at=now(),
                )
            )
        return file_id

    async def job(self, **values: Any) -> str:
        job_id = str(values.pop("id", None) or new_id("ftjob-"))
        async with self.database.begin() as session:
            session.add(
                Job(
                    id=job_id,
                    **{
                        "project_id": DEFAULT_PROJECT,
                        "status": "validating_files",
                        "model": "tiny",
                        "training_file": "file-a",
                        "validation_file": "file-b",
                        "seed": 7,
                        "method": METHOD,
                        "options": {},
                        "created_at": now(),
                        **values,
                    },
                )
            )
        return job_id

    async def rollout(self, job_id: str, state: RolloutState = RolloutState.TRAINED, **values: Any) -> str:
        rollout_id = str(values.pop("id", None) or new_trace_id())
        ended = {} if state is RolloutState.STARTED else {"finished_at": now()}
        async with self.database.begin() as session:
            session.add(
                Rollout(
                    id=rollout_id,
                    job_id=job_id,
                    state=state,
                    **{
                        "project_id": DEFAULT_PROJECT,
                        "attempt": 1,
                        "step": 1,
                        "split": "train",
                        "row": 0,
                        "group": 0,
                        "sample": 0,
                        "version": 0,
                        "started_at": now(),
                        **ended,
                        **values,
                    },
                )
            )
        return rollout_id

    async def checkpoint(self, job_id: str, step: int, project_id: str = DEFAULT_PROJECT, **metrics: float) -> str:
        checkpoint_id = new_id("ftckpt_")
        async with self.database.begin() as session:
            session.add(
                Checkpoint(
                    id=checkpoint_id,
                    project_id=project_id,
                    job_id=job_id,
                    step=step,
                    attempt=1,
                    name=f"ft:tiny:hone::{job_id[-8:]}:ckpt-step-{step}",
                    base_model="tiny",
                    path="unused",
                    sha256="unused",
                    metrics=metrics,
                    created_at=now(),
                )
            )
        return checkpoint_id
