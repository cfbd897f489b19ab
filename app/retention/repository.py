"""What rows still need of the disk, which rows nobody needs any more, and whose turn it is to clear both away: all SQL.

Does not cover: the directories (`workers.unnamed`) and when they are looked at (`workers.collection`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from app.checkpoints.store import key_of
from app.core.states import TERMINAL, JobStatus
from app.db.engine import now, rows_changed
from app.db.tables import (
    DEFAULT_PROJECT,
    AdapterPin,
    Base,
    Checkpoint,
    Duty,
    IdempotencyKey,
    Job,
    Sampler,
    SamplerAdapter,
    SamplerWant,
    Snapshot,
    WebhookDelivery,
)
from app.jobs.idempotency import KEPT_S
from app.webhooks.repository import PENDING

BATCH = 500  # rows a transaction: a writer on SQLite waits for no more than these
Place = tuple[str, str, str]  # job, "a<attempt>", name: ends of paths, whose beginnings may differ from host to host


@dataclass(frozen=True)
class Standing:
    """Of a job. over: it ended longer ago than the grace time, so that nobody is at its directories any more."""

    attempt: int
    running: bool
    over: bool

    def may_be_written(self, attempt: int) -> bool:
        """By the attempt's own processes. A number that no claim gave yet comes from another, newer database."""
        return attempt > self.attempt or (attempt == self.attempt and self.running)


@dataclass(frozen=True)
class Named:
    """What must stay. Jobs that are not here are not in this database, and nothing of theirs is ours to judge."""

    jobs: Mapping[str, Standing]
    snapshots: frozenset[Place]
    checkpoints: frozenset[Place]
    adapters: frozenset[str]  # names of directories: each has its job and attempt in it
    loaded: frozenset[Place]  # what a live sampler has loaded: a directory that vanishes under vLLM ends it


async def named(session: AsyncSession, grace_s: float) -> Named:
    """All of it at one moment, when `session` reads."""
    over = and_(Job.status.in_(TERMINAL), Job.finished_at <= now() - grace_s)
    jobs = await session.execute(select(Job.id, Job.attempt, Job.status, over))
    snapshots = await session.scalars(select(Snapshot.path).where(Snapshot.path != ""))
    checkpoints = await session.execute(select(Checkpoint.job_id, Checkpoint.attempt, Checkpoint.step))
    loaded = await session.scalars(
        select(SamplerAdapter.path)
        .join(Sampler, Sampler.id == SamplerAdapter.sampler_id)
        .where(Sampler.heartbeat > now() - grace_s)  # of a sampler that is gone only its row is left
    )
    in_samplers = [PurePosixPath(path) for path in loaded]
    loaded_places = frozenset(map(_place, in_samplers))
    pinned = await session.scalars(select(AdapterPin.name).where(AdapterPin.pinned_until > now()))
    return Named(
        jobs={row.id: Standing(row.attempt, row.status == JobStatus.RUNNING, bool(row[3])) for row in jobs},
        snapshots=frozenset(_snapshot(PurePosixPath(path)) for path in snapshots),
        checkpoints=frozenset(_place(PurePosixPath(key_of(*row))) for row in checkpoints) | loaded_places,
        adapters=frozenset([path.name for path in in_samplers] + list(pinned)),
        loaded=loaded_places,
    )


def _snapshot(path: PurePosixPath) -> Place:
    """`…/<job>/a<attempt>/snapshots/<name>`."""
    return path.parent.parent.parent.name, path.parent.parent.name, path.name


def _place(path: PurePosixPath) -> Place:
    """`…/<job>/a<attempt>/<name>`."""
    return path.parent.parent.name, path.parent.name, path.name


async def take_turn(session: AsyncSession, duty: str, every_s: float) -> bool:
    """Own the next round of `duty`; it comes up again after `every_s`, whatever becomes of this one."""
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    made = insert(Duty).values(name=duty, project_id=DEFAULT_PROJECT, due_at=0.0)
    await session.execute(made.on_conflict_do_nothing())
    due = update(Duty).where(Duty.name == duty, Duty.due_at <= now()).values(due_at=now() + every_s)
    return await rows_changed(session, due) == 1


async def is_due(session: AsyncSession, duty: str) -> bool:
    """Without writing: most looks find that somebody did it."""
    return await session.scalar(select(Duty.name).where(Duty.name == duty, Duty.due_at > now())) is None


async def forget_snapshots(session: AsyncSession, grace_s: float) -> int:
    """A job that is over never resumes. Before its directory goes: no row may name what is not there."""
    over = select(Job.id).where(Job.status.in_(TERMINAL), Job.finished_at <= now() - grace_s)
    return await _forget(session, Snapshot, Snapshot.id, Snapshot.job_id.in_(over))


async def forget_deliveries(session: AsyncSession, kept_s: float) -> int:
    """Webhooks that arrived or were given up."""
    done = and_(WebhookDelivery.state != PENDING, WebhookDelivery.finished_at <= now() - kept_s)
    return await _forget(session, WebhookDelivery, WebhookDelivery.seq, done)


async def forget_wants(session: AsyncSession, kept_s: float) -> int:
    """Wishes for samplers that ran out, and why they were not met."""
    return await _forget(session, SamplerWant, SamplerWant.base_model, SamplerWant.wanted_until <= now() - kept_s)


async def forget_idempotency_keys(session: AsyncSession) -> int:
    """A create clears away too; a service without creates keeps the last ones."""
    return await _forget(session, IdempotencyKey, IdempotencyKey.id, IdempotencyKey.created_at <= now() - KEPT_S)


async def _forget(
    session: AsyncSession, table: type[Base], key: InstrumentedAttribute[Any], which: ColumnElement[bool]
) -> int:
    """At most `BATCH`; as many as that means: ask again."""
    found = (await session.scalars(select(key).where(which).limit(BATCH))).all()
    await session.execute(delete(table).where(key.in_(found)).execution_options(synchronize_session=False))
    return len(found)
