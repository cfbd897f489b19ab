"""What a job did, from the database it wrote: the span of its training, its rollouts, its steps.

Does not cover: the wire, whose times are whole seconds. Opens the SQLite file read-only.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Training:
    """From the first training rollout to the end of the last step: what is compared with another trainer's loop.

    `began`: Unix seconds. `rollouts`: training rollouts started, replacements included. `tokens`: sampled by the graded
    ones. `reward`: mean of the graded ones. `states`: how many rollouts ended how.
    """

    began: float
    seconds: float
    rollouts: int
    tokens: int
    tool_calls: int
    turns: float
    reward: float
    states: dict[str, int]
    steps: list[dict[str, Any]]


def training(database: Path, job_id: str) -> Training:
    steps = step_events(database, job_id)
    with closing(_open(database)) as db:
        began, rollouts, tokens, calls, turns, reward = db.execute(
            "SELECT min(started_at), count(*), sum(completion_tokens), sum(tool_calls), avg(turns), avg(reward)"
            " FROM rollouts WHERE job_id = ? AND split = 'train'",
            (job_id,),
        ).fetchone()
        states = dict(
            db.execute(
                "SELECT state, count(*) FROM rollouts WHERE job_id = ? AND split = 'train' GROUP BY state", (job_id,)
            )
        )
    ended = max(step["at"] for step in steps)
    return Training(began, ended - began, rollouts, tokens, calls, turns, reward, states, steps)


def step_events(database: Path, job_id: str) -> list[dict[str, Any]]:
    """The metrics of every training step, oldest first, each with `at`: when it was written, Unix seconds."""
    with closing(_open(database)) as db:
        found = db.execute(
            "SELECT created_at, data FROM events WHERE job_id = ? AND type = 'metrics' ORDER BY seq", (job_id,)
        ).fetchall()
    by_step: dict[int, dict[str, Any]] = {}
    for at, text in found:
        data = json.loads(text)
        # The first event of a step: a validation pass writes the step's data once more, with `valid`.
        if data.get("step") and data["step"] not in by_step:
            by_step[data["step"]] = {**data, "at": at}
    return list(by_step.values())


def loaded_adapters(database: Path) -> int:
    """Adapter versions that samplers hold now."""
    with closing(_open(database)) as db:
        count: int = db.execute("SELECT count(*) FROM sampler_adapters").fetchone()[0]
    return count


def _open(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)
