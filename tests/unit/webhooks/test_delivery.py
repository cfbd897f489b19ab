"""Deliveries over a real connection to a scripted receiver: accepted by OpenAI's client, retried, given up, in order.

Does not cover: who wins an attempt, and which status changes write the outbox (`tests/db/test_webhooks.py`).
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import InvalidWebhookSignatureError
from openai.types.webhooks import FineTuningJobCancelledWebhookEvent
from sqlalchemy import select, update

from app.core.settings import Settings
from app.db import migrate
from app.db.engine import Database, now
from app.db.tables import DEFAULT_PROJECT, WebhookDelivery, WebhookEndpoint
from app.jobs import service as jobs
from app.net.clients import EgressPolicy, HttpClient, guarded_client
from app.security.vault import Vault, load_vault
from app.webhooks import delivery as delivering
from app.webhooks import service
from app.webhooks.delivery import BACK_OFF_S, Courier
from app.webhooks.service import Issued
from tests.db.rows import Seed
from tests.unit.net.user_endpoint import Reply, Seen, UserEndpoint
from workers.local import Runner

VAULT = Vault(["0123456789abcdef0123456789abcdef"])


@pytest.fixture
def courier(database: Database, http: HttpClient) -> Courier:
    return Courier(database, VAULT, http, jitter=lambda: 0.5)


async def listen(database: Database, endpoint: UserEndpoint) -> Issued:
    async with database.begin() as session:
        return await service.add(session, VAULT, DEFAULT_PROJECT, endpoint.url)


async def cancelled_job(database: Database, tmp_path: Path, *, paused_first: bool = False) -> str:
    job_id = await Seed(database, Settings(data_dir=tmp_path)).job(status="queued")
    async with database.begin() as session:
        if paused_first:
            await jobs.pause(session, DEFAULT_PROJECT, job_id)
        await jobs.cancel(session, DEFAULT_PROJECT, job_id)
    return job_id


async def delivery(database: Database) -> tuple[WebhookDelivery, float]:
    """The oldest, and in how many seconds it is due."""
    async with database.read() as session:
        query = select(WebhookDelivery, WebhookDelivery.due_at - now()).order_by(WebhookDelivery.seq).limit(1)
        row, due_in = (await session.execute(query)).one()
    return row, due_in


async def pass_time(database: Database) -> None:
    async with database.begin() as session:
        await session.execute(update(WebhookDelivery).values(due_at=now() - 1))


def unwrap(seen: Seen, secret: str) -> object:
    client = openai.OpenAI(api_key="unused", webhook_secret=secret)
    try:
        return client.webhooks.unwrap(seen.body, seen.headers)
    finally:
        client.close()


async def test_openais_client_accepts_a_delivery(
    database: Database, courier: Courier, endpoint: UserEndpoint, tmp_path: Path
) -> None:
    issued = await listen(database, endpoint)
    job_id = await cancelled_job(database, tmp_path)
    assert await courier.deliver_due() == 1
    event = unwrap(endpoint.seen[0], issued.secret)
    assert isinstance(event, FineTuningJobCancelledWebhookEvent)
    row, _ = await delivery(database)
    assert (event.data.id, event.id, event.object, event.created_at) == (
        job_id, row.event_id, "event", int(row.created_at),
    )  # fmt: skip
    assert endpoint.seen[0].headers["webhook-id"] == event.id
    assert (row.state, row.response_status, row.attempts) == ("delivered", 200, 1)
    assert await courier.deliver_due() == 0


async def test_openais_client_refuses_a_changed_body_and_another_secret(
    database: Database, courier: Courier, endpoint: UserEndpoint, tmp_path: Path
) -> None:
    issued = await listen(database, endpoint)
    await cancelled_job(database, tmp_path)
    await courier.deliver_due()
    (seen,) = endpoint.seen
    changed = Seen(seen.method, seen.path, seen.headers, seen.names, seen.body.replace(b"cancelled", b"succeeded"))
    with pytest.raises(InvalidWebhookSignatureError):
        unwrap(changed, issued.secret)
    with pytest.raises(InvalidWebhookSignatureError):
        unwrap(seen, "whsec_" + "A" * 44)


async def test_after_a_rotation_both_secrets_verify_until_a_day_has_passed(
    database: Database, courier: Courier, endpoint: UserEndpoint, tmp_path: Path
) -> None:
    old = await listen(database, endpoint)
    async with database.begin() as session:
        new = await service.rotate(session, VAULT, DEFAULT_PROJECT, old.endpoint_id)
    await cancelled_job(database, tmp_path)
    await courier.deliver_due()
    assert unwrap(endpoint.seen[0], old.secret) == unwrap(endpoint.seen[0], new.secret)
    async with database.begin() as session:
        await session.execute(update(WebhookEndpoint).values(old_secret_until=now() - 1))
    await cancelled_job(database, tmp_path)
    await courier.deliver_due()
    unwrap(endpoint.seen[1], new.secret)
    with pytest.raises(InvalidWebhookSignatureError):
        unwrap(endpoint.seen[1], old.secret)


async def test_a_failure_is_repeated_after_a_growing_pause_with_the_same_id_and_bytes(
    database: Database, courier: Courier, endpoint: UserEndpoint, tmp_path: Path
) -> None:
    await listen(database, endpoint)
    endpoint.plays(Reply(500, "down"), Reply(404), Reply(301), Reply(204, b""))
    await cancelled_job(database, tmp_path)
    for number, (status, pause) in enumerate(zip((500, 404, None), BACK_OFF_S, strict=False), start=1):
        assert await courier.deliver_due() == 1
        row, due_in = await delivery(database)
        assert (row.state, row.attempts, row.response_status) == ("pending", number, status)
        assert due_in == pytest.approx(pause, abs=4)
        assert await courier.deliver_due() == 0
        await pass_time(database)
    await courier.deliver_due()
    row, _ = await delivery(database)
    assert (row.state, row.response_status, row.last_error) == ("delivered", 204, None)
    assert len({(seen.headers["webhook-id"], seen.body) for seen in endpoint.seen}) == 1


async def test_a_receiver_that_never_agrees_is_given_up_and_the_next_event_goes_out(
    database: Database, courier: Courier, endpoint: UserEndpoint, tmp_path: Path
) -> None:
    await listen(database, endpoint)
    endpoint.plays(Reply(503))
    await cancelled_job(database, tmp_path, paused_first=True)
    for _ in range(len(BACK_OFF_S) + 1):
        await courier.deliver_due()
        await pass_time(database)
    row, _ = await delivery(database)
    assert (row.type, row.state, row.attempts) == ("fine_tuning.job.paused", "given_up", len(BACK_OFF_S) + 1)
    endpoint.plays(Reply(200))
    await courier.deliver_due()
    assert [seen.json["type"] for seen in endpoint.seen][-2:] == ["fine_tuning.job.paused", "fine_tuning.job.cancelled"]


async def test_a_receivers_pause_is_kept(
    database: Database, courier: Courier, endpoint: UserEndpoint, tmp_path: Path
) -> None:
    await listen(database, endpoint)
    endpoint.plays(Reply(429, headers={"retry-after": "300"}))
    await cancelled_job(database, tmp_path)
    await courier.deliver_due()
    assert (await delivery(database))[1] == pytest.approx(300, abs=4)


async def test_410_turns_the_endpoint_off(
    database: Database, courier: Courier, endpoint: UserEndpoint, tmp_path: Path
) -> None:
    await listen(database, endpoint)
    endpoint.plays(Reply(410))
    await cancelled_job(database, tmp_path, paused_first=True)
    await courier.deliver_due()
    await pass_time(database)
    await cancelled_job(database, tmp_path)
    assert await courier.deliver_due() == 0
    async with database.read() as session:
        (view,) = await service.list_endpoints(session, DEFAULT_PROJECT)
    assert view.endpoint.disabled_at is not None
    assert (view.backlog.waiting, view.backlog.given_up) == (0, 2)


async def test_a_long_answer_is_not_stored_and_ours_is_not_echoed(
    database: Database, courier: Courier, endpoint: UserEndpoint, tmp_path: Path
) -> None:
    await listen(database, endpoint)
    endpoint.plays(Reply(500, b"x" * 5000))
    await cancelled_job(database, tmp_path)
    await courier.deliver_due()
    error = (await delivery(database))[0].last_error or ""
    assert "answered 500" in error
    assert len(error) <= 500


async def test_a_private_address_is_not_dialled(database: Database, endpoint: UserEndpoint, tmp_path: Path) -> None:
    await listen(database, endpoint)
    await cancelled_job(database, tmp_path)
    async with guarded_client(EgressPolicy(), timeout_s=5) as http:
        await Courier(database, VAULT, http).deliver_due()
    row, _ = await delivery(database)
    assert endpoint.seen == []
    assert "is not a public address" in (row.last_error or "")


async def test_a_secret_that_does_not_open_sends_nothing_and_waits(
    database: Database, http: HttpClient, endpoint: UserEndpoint, tmp_path: Path
) -> None:
    await listen(database, endpoint)
    await cancelled_job(database, tmp_path)
    await Courier(database, Vault(["another key of thirty-two letters"]), http).deliver_due()
    row, _ = await delivery(database)
    assert endpoint.seen == []
    assert (row.state, row.attempts) == ("pending", 1)
    assert "cannot be opened" in (row.last_error or "")


async def test_a_kick_begins_one_pass_at_a_time(
    database: Database, courier: Courier, endpoint: UserEndpoint, tmp_path: Path
) -> None:
    await listen(database, endpoint)
    await cancelled_job(database, tmp_path)
    courier.kick()
    courier.kick()
    while (await delivery(database))[0].state == "pending":
        courier.kick()
    await courier.close()
    assert len(endpoint.seen) == 1


async def test_an_answer_that_hangs_ends_at_the_deadline_and_holds_no_one_else_up(
    database: Database, courier: Courier, endpoint: UserEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivering, "TIMEOUT_S", 0.2)
    await listen(database, endpoint)
    endpoint.plays(Reply(delay_s=5), Reply(200))
    for _ in range(2):
        await cancelled_job(database, tmp_path)
    assert await courier.deliver_due() == 2
    async with database.read() as session:
        rows = (await session.scalars(select(WebhookDelivery))).all()
    assert sorted((row.state, row.last_error) for row in rows) == [
        ("delivered", None), ("pending", "no complete answer within 0.2 s"),
    ]  # fmt: skip


async def test_the_runner_sends_what_waits(endpoint: UserEndpoint, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", egress_allow=f"127.0.0.1:{endpoint.port}")
    settings.root.mkdir()
    migrate.upgrade(settings.database)
    runner = Runner(settings)
    key = load_vault(None, settings.root)
    async with runner.database.begin() as session:
        issued = await service.add(session, key, DEFAULT_PROJECT, endpoint.url)
    await cancelled_job(runner.database, tmp_path)
    await runner.tick()
    async with asyncio.timeout(20):
        while not endpoint.seen:
            await asyncio.sleep(0.01)
    await runner.shut_down()
    assert isinstance(unwrap(endpoint.seen[0], issued.secret), FineTuningJobCancelledWebhookEvent)


async def test_openais_client_takes_our_own_type_as_well(
    database: Database, courier: Courier, endpoint: UserEndpoint, tmp_path: Path
) -> None:
    issued = await listen(database, endpoint)
    job_id = await cancelled_job(database, tmp_path, paused_first=True)
    await courier.deliver_due()
    event: Any = unwrap(endpoint.seen[0], issued.secret)
    assert (event.type, event.data.id) == ("fine_tuning.job.paused", job_id)
