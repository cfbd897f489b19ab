"""What rows name, which rows go and when, and whose turn it is; on both databases."""

from __future__ import annotations

import asyncio
from typing import Any

from sqlalchemy import func, select, update

from app.core.settings import Settings
from app.db.engine import Database, now
from app.db.tables import (
    DEFAULT_PROJECT,
    Duty,
    IdempotencyKey,
    SamplerWant,
    Snapshot,
    WebhookDelivery,
    WebhookEndpoint,
)
from app.retention import repository
from app.retention.repository import BATCH, Standing
from tests.db.rows import Seed

DAY_S = 86400.0


async def test_one_of_many_takes_a_turn_and_it_comes_up_again(database: Database) -> None:
    async def take() -> bool:
        async with database.begin() as session:
            return await repository.take_turn(session, "sweeping", 60.0)

    assert sum(await asyncio.gather(*(take() for _ in range(5)))) == 1
    async with database.read() as session:
        assert not await repository.is_due(session, "sweeping")
        assert await repository.is_due(session, "dusting")
    async with database.begin() as session:
        await session.execute(update(Duty).values(due_at=now()))
    async with database.read() as session:
        assert await repository.is_due(session, "sweeping")
    assert await take()


async def test_a_job_is_over_once_its_end_is_longer_ago_than_the_grace_time(database: Database, seed: Seed) -> None:
    running = await seed.job(status="running", attempt=2)
    ended = await seed.job(status="succeeded", attempt=3, finished_at=now() - 50)
    over = await seed.job(status="cancelled", attempt=4, finished_at=now() - 150)
    async with database.read() as session:
        found = await repository.named(session, 100.0)
    assert found.jobs == {
        running: Standing(2, True, False), ended: Standing(3, False, False), over: Standing(4, False, True),
    }  # fmt: skip
    assert [found.jobs[running].may_be_written(attempt) for attempt in (1, 2, 3)] == [False, True, True]


async def test_snapshots_and_checkpoints_are_named_by_job_attempt_and_step(database: Database, seed: Seed) -> None:
    job_id = await seed.job(status="paused", attempt=1)
    await seed.checkpoint(job_id, 4)
    async with database.begin() as session:
        for step, path in ((3, f"/mnt/x/jobs/{job_id}/a1/snapshots/step-3"), (4, "")):
            session.add(
                Snapshot(
                    project_id=DEFAULT_PROJECT,
                    job_id=job_id,
                    step=step,
                    attempt=1,
                    path=path,
                    sha256="",
                    cursor={},
                    created_at=now(),
                )
            )
    async with database.read() as session:
        found = await repository.named(session, 100.0)
    assert found.snapshots == {(job_id, "a1", "step-3")}
    assert found.checkpoints == {(job_id, "a1", "step-4")}


async def test_only_old_rows_that_are_done_with_go(database: Database, seed: Seed) -> None:
    job_id = await seed.job()
    old, young = now() - 31 * DAY_S, now() - 29 * DAY_S
    async with database.begin() as session:
        session.add(_endpoint())
        await session.flush()
        for number, (state, ended) in enumerate(
            [("delivered", old), ("given_up", old), ("delivered", young), ("pending", None)]
        ):
            session.add(_delivery(job_id, f"evt_{number}", state, ended))
        for key, created_at in (("a", now() - 2 * DAY_S), ("b", now())):
            session.add(
                IdempotencyKey(
                    project_id=DEFAULT_PROJECT,
                    route="x",
                    key=key,
                    request_hash="x",
                    resource_id="x",
                    created_at=created_at,
                )
            )
        for model, until in (("stale", old), ("wanted", now() + 60)):
            session.add(SamplerWant(base_model=model, project_id=DEFAULT_PROJECT, wanted_until=until))
    async with database.begin() as session:
        assert await repository.forget_deliveries(session, 30 * DAY_S) == 2
        assert await repository.forget_idempotency_keys(session) == 1
        assert await repository.forget_wants(session, 30 * DAY_S) == 1
    async with database.read() as session:
        left = (await session.scalars(select(WebhookDelivery.event_id).order_by(WebhookDelivery.seq))).all()
        assert left == ["evt_2", "evt_3"]
        assert await session.scalar(select(IdempotencyKey.key)) == "b"
        assert await session.scalar(select(SamplerWant.base_model)) == "wanted"


async def test_many_rows_go_in_several_transactions(database: Database, seed: Seed, settings: Settings) -> None:
    job_id = await seed.job()
    async with database.begin() as session:
        session.add(_endpoint())
        await session.flush()
        session.add_all(_delivery(job_id, f"evt_{number}", "delivered", 1.0) for number in range(BATCH + 1))
    async with database.begin() as session:
        assert await repository.forget_deliveries(session, 30 * DAY_S) == BATCH
    async with database.begin() as session:
        assert await repository.forget_deliveries(session, 30 * DAY_S) == 1
        assert await session.scalar(select(func.count()).select_from(WebhookDelivery)) == 0


def _endpoint() -> WebhookEndpoint:
    return WebhookEndpoint(
        id="we_1", project_id=DEFAULT_PROJECT, url="https://x", events=[], secret="x", created_at=1.0
    )


def _delivery(job_id: str, event_id: str, state: str, finished_at: Any) -> WebhookDelivery:
    return WebhookDelivery(
        event_id=event_id, project_id=DEFAULT_PROJECT, endpoint_id="we_1", job_id=job_id, type="x", created_at=1.0,
        state=state, due_at=1.0, finished_at=finished_at,
    )  # fmt: skip
