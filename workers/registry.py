"""What a run registers in one fenced transaction each: a finished step, a checkpoint, the end of the job.

Does not cover: rollouts and events during a step (`workers.rollouts.recorder`). Files are complete and fsynced before
the row that names them exists; a resume reads rows, never directory listings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.ids import new_id
from app.core.states import TERMINAL, JobStatus, RolloutState
from app.db.engine import Database, now
from app.db.tables import Checkpoint, Event, Job, Snapshot
from app.files import service as files
from app.files.storage import Stored
from app.jobs import events, leases
from app.rollouts import ledger
from workers.results import FILENAME

KEPT_SNAPSHOTS = 2


@dataclass(frozen=True)
class StepRecord:
    """Everything that becomes true when a step is done."""

    step: int
    snapshot: str
    snapshot_sha256: str
    cursor: Mapping[str, Any]
    trained_tokens: int
    settled: Mapping[RolloutState, Sequence[str]]
    advantages: Mapping[str, float] = field(default_factory=dict)
    events: Sequence[tuple[str, dict[str, Any]]] = ()


class Registry:
    """One per run."""

    def __init__(self, database: Database, fence: leases.Fence) -> None:
        self._database = database
        self._fence = fence

    async def step_done(self, record: StepRecord) -> list[str]:
        """Register a step; returns snapshot directories that no row names any more (for the caller to delete)."""
        fence = self._fence
        async with self._database.begin() as session:
            await leases.fenced(
                session, fence, step=record.step, crashes=0, trained_tokens=Job.trained_tokens + record.trained_tokens
            )
            for state, ids in record.settled.items():
                await ledger.settle(session, ids, state)
            await ledger.settle(session, [], RolloutState.TRAINED, record.advantages)
            session.add(
                Snapshot(
                    project_id=fence.project_id,
                    job_id=fence.job_id,
                    step=record.step,
                    attempt=fence.attempt,
                    path=record.snapshot,
                    sha256=record.snapshot_sha256,
                    cursor=dict(record.cursor),
                    created_at=now(),
                )
            )
            await session.flush()
            dropped = await self._prune(session)
            for message, data in record.events:
                await self._metrics(session, message, data)
        return dropped

    async def _prune(self, session: AsyncSession) -> list[str]:
        rows = (
            await session.scalars(
                select(Snapshot)
                .where(Snapshot.job_id == self._fence.job_id)
                .order_by(Snapshot.step.desc(), Snapshot.attempt.desc())
            )
        ).all()
        kept = {row.path for row in rows[:KEPT_SNAPSHOTS]}
        old = rows[KEPT_SNAPSHOTS:]
        await session.execute(delete(Snapshot).where(Snapshot.id.in_([row.id for row in old])))
        return [path for path in {row.path for row in old} if path not in kept]

    async def _metrics(self, session: AsyncSession, message: str, data: dict[str, Any]) -> None:
        await events.append(
            session,
            project_id=self._fence.project_id,
            job_id=self._fence.job_id,
            message=message,
            type="metrics",
            data=data,
        )

    async def metrics(self, message: str, data: dict[str, Any]) -> None:
        async with self._database.begin() as session:
            await leases.fenced(session, self._fence)
            await self._metrics(session, message, data)

    async def checkpoint(
        self, step: int, name: str, base_model: str, path: Path, sha256: str, metrics: Mapping[str, Any]
    ) -> None:
        """Register the checkpoint of a step, with its event."""
        fence = self._fence
        async with self._database.begin() as session:
            await leases.fenced(session, fence)
            session.add(
                Checkpoint(
                    id=new_id("ftckpt_"),
                    project_id=fence.project_id,
                    job_id=fence.job_id,
                    step=step,
                    attempt=fence.attempt,
                    name=name,
                    base_model=base_model,
                    path=str(path),
                    sha256=sha256,
                    metrics=dict(metrics),
                    created_at=now(),
                )
            )
            await session.flush()
            await events.append(
                session,
                project_id=fence.project_id,
                job_id=fence.job_id,
                message=f"Checkpoint created at step {step} with Snapshot ID: {name}",
                data={"step": step, "fine_tuned_model_checkpoint": name},
            )

    async def has_checkpoint(self, step: int) -> bool:
        async with self._database.read() as session:
            query = select(Checkpoint.id).where(Checkpoint.job_id == self._fence.job_id, Checkpoint.step == step)
            return await session.scalar(query) is not None

    async def job_is_over(self) -> bool:
        """Has the job a terminal status, whoever gave it that?"""
        async with self._database.read() as session:
            status = await session.scalar(select(Job.status).where(Job.id == self._fence.job_id))
        return status is None or status in TERMINAL

    async def metrics_history(self) -> list[dict[str, Any]]:
        """Data of all metrics events so far, oldest first: the result file is made of them."""
        async with self._database.read() as session:
            query = select(Event.data).where(Event.job_id == self._fence.job_id, Event.type == "metrics")
            return [data for data in (await session.scalars(query.order_by(Event.seq))).all() if data]

    async def succeeded(self, model: str, result_file: str, stored: Stored) -> None:
        """running → succeeded, with the result file and the final events, in one transaction."""
        fence = self._fence
        async with self._database.begin() as session:
            await leases.finish(session, fence, JobStatus.SUCCEEDED, fine_tuned_model=model, result_files=[result_file])
            await files.add_produced(session, fence.project_id, result_file, stored, filename=FILENAME)
            for message in (f"New fine-tuned model created: {model}", "The job has successfully completed"):
                await events.append(session, project_id=fence.project_id, job_id=fence.job_id, message=message)

    async def failed(self, code: str, message: str, param: str | None, detail: Mapping[str, Any] | None) -> None:
        """running → failed, with the reason on the job and in the last event."""
        fence = self._fence
        async with self._database.begin() as session:
            error = {"code": code, "message": message, "param": param}
            await leases.finish(session, fence, JobStatus.FAILED, error=error)
            await events.append(
                session,
                project_id=fence.project_id,
                job_id=fence.job_id,
                level="error",
                message=message,
                data={"code": code, "param": param, **(detail or {})},
            )
