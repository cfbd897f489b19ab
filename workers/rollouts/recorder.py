"""What a run writes while it samples: ledger rows and traces batched once a second, activity, events.

Does not cover: steps and checkpoints (`workers.registry`), nor the lease (`workers.heartbeat`).

Every write is fenced. A lost lease surfaces in `lost` and stops the run; nothing is written after it. On SQLite one
transaction a second, with no file I/O inside, keeps the API's writes fast (design §6.9).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from app.core.states import RolloutState
from app.db.engine import Database, now
from app.jobs import events, leases
from app.rollouts import ledger, traces
from workers.rollouts.types import Ended, RolloutKey, Row, Trajectory

FLUSH_S = 1.0


class Recorder:
    """One per run. `start` before a rollout may ask anything of anybody; `ended` when it is over."""

    def __init__(self, database: Database, fence: leases.Fence, traces_dir: Path, seconds: dict[str, float]) -> None:
        self._database = database
        self._fence = fence
        self._traces_dir = traces_dir
        self._queue: list[tuple[Ended, Row]] = []
        self._flushing = asyncio.Lock()
        self._finished = False
        self._activity: tuple[str, float] | None = None
        self._shown: str | None = None
        self.seconds = seconds  # per phase, over all attempts; stored with every flush
        self.live: dict[str, Any] = {}  # facts that last, shown on the job beside the phases (`jobs.live`)
        self.present: Callable[[], Mapping[str, Any]] = dict  # facts of the moment, asked with every flush
        self.describe: Callable[[], str | None] = lambda: None  # what the run is doing, asked once a second
        self.on_flush: Callable[[], None] = lambda: None

    async def start(self, keys: Sequence[RolloutKey]) -> None:
        """Record rollouts as started. Raises `LeaseLost`."""
        fence = self._fence
        common = {"project_id": fence.project_id, "job_id": fence.job_id, "attempt": fence.attempt}
        common |= {"truncated": False, "turns": 0, "tool_calls": 0, "invalid_calls": 0}
        common |= {"completion_tokens": 0, "prompt_tokens": 0}
        async with self._database.begin() as session:
            await leases.fenced(session, fence)
            await ledger.start(session, [{**common, **key.ledger_row()} for key in keys])

    def ended(self, ended: Ended, row: Row) -> None:
        """Queue a rollout's outcome and trace for the next flush."""
        self._queue.append((ended, row))

    def activity(self, text: str) -> None:
        """What the job is doing now; its age is counted from the first time this text was set."""
        if self._activity is None or self._activity[0] != text:
            self._activity = (text, time.time())

    async def event(
        self, message: str, *, level: events.Level = "info", data: dict[str, Any] | None = None, metrics: bool = False
    ) -> None:
        async with self._database.begin() as session:
            await leases.fenced(session, self._fence)
            await events.append(
                session,
                project_id=self._fence.project_id,
                job_id=self._fence.job_id,
                message=message,
                level=level,
                type="metrics" if metrics else "message",
                data=data,
            )

    async def run(self) -> None:
        """Flush once a second until cancelled; raises `LeaseLost`."""
        while True:
            await asyncio.sleep(FLUSH_S)
            if (text := self.describe()) is not None:
                self.activity(text)
            await self.flush()
            self.on_flush()

    async def flush(self) -> None:
        """Write what is queued. Raises `LeaseLost`."""
        async with self._flushing:
            if not self._finished:
                await self._write()

    async def finish(self) -> None:
        """The last flush: the job is about to end, and a later one would find the lease gone and call that a loss."""
        async with self._flushing:
            await self._write()
            self._finished = True

    async def _write(self) -> None:
        """Traces first (a thread), then one short transaction."""
        batch, self._queue = self._queue, []
        rows = await asyncio.to_thread(self._write_traces, batch) if batch else []
        values: dict[str, Any] = {"seconds": {name: round(s, 3) for name, s in self.seconds.items()}}
        if live := {**self.live, **self.present()}:
            values["live"] = live
        if self._activity is not None:
            values["activity"] = self._activity[0]
            if self._activity[0] != self._shown:
                values["activity_at"] = now()
                self._shown = self._activity[0]
        async with self._database.begin() as session:
            await leases.fenced(session, self._fence, **values)
            await ledger.graded(session, rows)

    def _write_traces(self, batch: Iterable[tuple[Ended, Row]]) -> list[dict[str, Any]]:
        rows = []
        for ended, row in batch:
            key = ended.key
            name = f"step-{key.step}{'-valid' if key.split == 'valid' else ''}.jsonl.zst"
            file = f"{self._fence.job_id}/a{self._fence.attempt}/{name}"
            offset, length = traces.append_trace(self._traces_dir / file, trace_of(ended, row))
            rows.append(_ledger_values(ended) | {"trace_file": file, "trace_offset": offset, "trace_length": length})
        return rows


def trace_of(ended: Ended, row: Row) -> dict[str, Any]:
    """The whole rollout as it is stored; never a header, never a secret."""
    key, trajectory, grade = ended.key, ended.trajectory, ended.grade
    return {
        "id": key.id,
        "row": key.row,
        "version": key.version,
        "greedy": key.greedy,
        "messages": [*row.messages, *trajectory.messages],
        "prompt_messages": len(row.messages),
        # All segments joined; `segments` says which part is which training row.
        "tokens": {
            "ids": traces.pack(list(chain.from_iterable(s.ids for s in trajectory.segments)), "ids"),
            "mask": traces.pack(list(chain.from_iterable(s.mask for s in trajectory.segments)), "mask"),
            "log_probs": traces.pack(list(chain.from_iterable(s.log_probs for s in trajectory.segments)), "log_probs"),
        },
        "segments": _segments(trajectory),
        "bridge_breaks": trajectory.bridge_breaks,
        "turns": [call.as_dict() for call in trajectory.turns],
        "tool_calls": [vars(record) for record in trajectory.tools],
        "grade": None
        if grade is None
        else {
            "score": grade.score,
            "sub_scores": dict(grade.sub_scores),
            "reason": grade.reason,
            "seconds": grade.seconds,
            "attempts": grade.attempts,
            "extra": dict(grade.extra),
        },
        "stop_reason": trajectory.stop_reason,
        "error": ended.error,
    }


def _segments(trajectory: Trajectory) -> list[dict[str, Any]]:
    """Which part of `tokens` each training row is, and the turn whose ids it begins with (null: a root)."""
    ends = list(accumulate(len(segment.ids) for segment in trajectory.segments))
    return [
        {"start": start, "end": end, "parent": segment.parent}
        for start, end, segment in zip([0, *ends], ends, trajectory.segments, strict=False)
    ]


def _ledger_values(ended: Ended) -> dict[str, Any]:
    trajectory, grade = ended.trajectory, ended.grade
    if ended.state is not None:
        state = ended.state
    else:
        state = RolloutState.EVALUATED if ended.key.split == "valid" else RolloutState.STARTED
    return {
        "id": ended.key.id,
        "state": state.value,
        "reward": None if grade is None else grade.score,
        "sub_scores": None if grade is None else dict(grade.sub_scores),
        "stop_reason": None if trajectory.stop_reason is None else trajectory.stop_reason.value,
        "truncated": trajectory.truncated,
        "turns": len(trajectory.turns),
        "tool_calls": len(trajectory.tools),
        "invalid_calls": trajectory.invalid_calls,
        "completion_tokens": trajectory.completion_tokens,
        "prompt_tokens": trajectory.prompt_tokens,
        "error": ended.error,
        "seconds": {name: round(value, 4) for name, value in trajectory.seconds.items()},
    }
