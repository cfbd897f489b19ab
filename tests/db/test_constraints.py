"""States that no code may write are refused by the tables themselves. Does not cover: who may write."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError

from app.core.states import RolloutState
from app.db.engine import Database, now
from app.db.tables import DEFAULT_PROJECT, Base, Event, IdempotencyKey, Snapshot
from tests.db.rows import Seed


@pytest.mark.parametrize(
    "values",
    [
        {"status": "sleeping"},
        {"status": "queued", "lease_owner": "w", "lease_until": 1.0},
        {"status": "queued", "reserved_slots": 2},
        {"status": "paused", "running_since": 1.0},
        {"status": "queued", "attempt": -1},
        {"status": "queued", "step": -1},
        {"status": "queued", "crashes": -1},
    ],
    ids=str,
)
async def test_a_job_that_cannot_be_is_refused(seed: Seed, values: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError):
        await seed.job(**values)


@pytest.mark.parametrize(
    "values",
    [{"state": "forgotten"}, {"split": "test"}, {"finished_at": None}, {"job_id": "ftjob-unknown"}, {"turns": -1}],
    ids=str,
)
async def test_a_rollout_that_cannot_be_is_refused(seed: Seed, values: dict[str, Any]) -> None:
    rollout = {"job_id": await seed.job(), "state": RolloutState.TRAINED, **values}
    with pytest.raises(IntegrityError):
        await seed.rollout(rollout.pop("job_id"), rollout.pop("state"), **rollout)


async def test_two_jobs_cannot_have_made_one_model(seed: Seed) -> None:
    await seed.job(fine_tuned_model="ft:x")
    with pytest.raises(IntegrityError):
        await seed.job(fine_tuned_model="ft:x")


async def test_a_step_is_registered_once(seed: Seed) -> None:
    job_id = await seed.job()
    await seed.checkpoint(job_id, 3)
    with pytest.raises(IntegrityError):
        await seed.checkpoint(job_id, 3)


async def test_rows_that_stand_for_one_thing_stand_once(database: Database, seed: Seed) -> None:
    job_id = await seed.job()

    def twice() -> list[list[Base]]:
        snapshot = {"project_id": DEFAULT_PROJECT, "job_id": job_id, "step": 1, "attempt": 1, "path": "p"}
        key = {"project_id": DEFAULT_PROJECT, "route": "r", "key": "k", "request_hash": "h", "resource_id": "x"}
        event = {"project_id": DEFAULT_PROJECT, "job_id": job_id, "level": "info", "type": "message", "message": "m"}
        return [
            [Snapshot(**snapshot, sha256="x", cursor={}, created_at=now()) for _ in range(2)],
            [IdempotencyKey(**key, created_at=now()) for _ in range(2)],
            [Event(**event, id="ftevent-1", created_at=now()) for _ in range(2)],
        ]

    for rows in twice():
        with pytest.raises(IntegrityError):
            async with database.begin() as session:
                session.add_all(rows)
