"""The outbox: which status changes write it, who owns an attempt, in which order, and what a project may not see.

Does not cover: requests over a network (`tests/unit/webhooks`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import select, update

from app.core.errors import InvalidRequest, NotFound
from app.core.states import JobStatus
from app.db.engine import Database, now
from app.db.tables import DEFAULT_PROJECT, WebhookDelivery, WebhookEndpoint
from app.jobs import leases, reconcile
from app.jobs import service as jobs
from app.security.vault import Vault
from app.webhooks import repository, service
from app.webhooks.schemas import EVENT_TYPES
from tests.db.rows import Seed

URL = "https://example.com/hook"
VAULT = Vault(["0123456789abcdef0123456789abcdef"])


async def endpoint(database: Database, project_id: str = DEFAULT_PROJECT, events: Sequence[str] = ()) -> str:
    async with database.begin() as session:
        return (await service.add(session, VAULT, project_id, URL, events)).endpoint_id


async def deliveries(database: Database) -> list[WebhookDelivery]:
    async with database.read() as session:
        return list((await session.scalars(select(WebhookDelivery).order_by(WebhookDelivery.seq))).all())


async def types(database: Database) -> list[str]:
    return [row.type.removeprefix("fine_tuning.job.") for row in await deliveries(database)]


async def running(database: Database, seed: Seed, **values: Any) -> leases.Fence:
    job_id = await seed.job(status="queued", plan={"max_staleness": 0}, **values)
    async with database.begin() as session:
        claim = await leases.claim(session, job_id, owner="one", lease_s=60, adapter_slots=8)
    assert claim is not None
    return claim.fence


async def due(database: Database) -> list[int]:
    async with database.read() as session:
        return [seq for seq, _ in await repository.due(session, 32, 4)]


async def claim(database: Database, seq: int, attempts: int = 0) -> repository.Attempt | None:
    async with database.begin() as session:
        return await repository.claim(session, seq, attempts, 60)


@pytest.mark.parametrize("status", [JobStatus.SUCCEEDED, JobStatus.FAILED])
async def test_the_end_of_a_run_is_an_event(database: Database, seed: Seed, status: JobStatus) -> None:
    ours = await endpoint(database)
    fence = await running(database, seed)
    async with database.begin() as session:
        await leases.finish(session, fence, status)
    (row,) = await deliveries(database)
    assert (row.endpoint_id, row.job_id, row.type, row.state) == (
        ours, fence.job_id, f"fine_tuning.job.{status}", "pending",
    )  # fmt: skip
    assert row.event_id.startswith("evt_")


async def test_a_workers_pause_is_an_event(database: Database, seed: Seed) -> None:
    await endpoint(database)
    fence = await running(database, seed)
    async with database.begin() as session:
        await leases.pause(session, fence, reason="unproved")
    assert await types(database) == ["paused"]


async def test_a_clients_pause_and_cancel_are_events_and_a_repeated_pause_is_none(
    database: Database, seed: Seed
) -> None:
    await endpoint(database)
    job_id = await seed.job(status="queued")
    for act in (jobs.pause, jobs.pause, jobs.cancel):
        async with database.begin() as session:
            await act(session, DEFAULT_PROJECT, job_id)
    assert await types(database) == ["paused", "cancelled"]


async def test_bad_files_are_an_event_and_good_ones_are_not(database: Database, seed: Seed) -> None:
    await endpoint(database)
    for error in ({"code": "invalid_training_file"}, None):
        job_id = await seed.job()
        async with database.begin() as session:
            await leases.claim_validation(session, job_id, "reader")
            plan = None if error else {"total_steps": 1}
            assert await leases.finish_validation(session, job_id, "reader", plan=plan, error=error)
    assert await types(database) == ["failed"]


async def test_a_crash_is_an_event_only_when_it_was_the_last_allowed(database: Database, seed: Seed) -> None:
    await endpoint(database)
    for crashes in (0, 2):
        await seed.job(status="running", crashes=crashes, lease_owner="dead", lease_until=0.0)
    async with database.begin() as session:
        await reconcile.take_back_expired(session, 3)
    assert await types(database) == ["failed"]


async def test_the_event_goes_with_the_transaction_that_caused_it(database: Database, seed: Seed) -> None:
    await endpoint(database)
    fence = await running(database, seed)

    async def dies() -> None:
        async with database.begin() as session:
            await leases.finish(session, fence, JobStatus.SUCCEEDED)
            raise RuntimeError("before the commit")

    with pytest.raises(RuntimeError):
        await dies()
    assert await deliveries(database) == []


async def test_only_endpoints_of_the_project_that_want_the_type_and_are_on_get_it(
    database: Database, seed: Seed
) -> None:
    wanted = [await endpoint(database), await endpoint(database, events=["fine_tuning.job.cancelled"])]
    await endpoint(database, events=["fine_tuning.job.failed"])
    await endpoint(database, project_id="proj_other")
    off = await endpoint(database)
    async with database.begin() as session:
        await repository.disable(session, off, "gone")
    await _cancelled(database, await seed.job())
    rows = await deliveries(database)
    assert [row.endpoint_id for row in rows] == wanted
    assert len({row.event_id for row in rows}) == 1


async def test_one_of_ten_senders_wins_an_attempt(database: Database, seed: Seed) -> None:
    await _two_events(database, seed)
    (first,) = await due(database)
    won = [one for one in await asyncio.gather(*(claim(database, first) for _ in range(10))) if one is not None]
    assert [one.number for one in won] == [1]


async def test_an_event_waits_for_the_one_before_it_of_the_same_job(database: Database, seed: Seed) -> None:
    await _two_events(database, seed)
    first, second = (row.seq for row in await deliveries(database))
    assert await due(database) == [first]
    attempt = await claim(database, first)
    assert attempt is not None
    assert await due(database) == []  # in flight: nobody overtakes
    async with database.begin() as session:
        assert await repository.delivered(session, attempt, 204)
    assert await due(database) == [second]


async def test_a_busy_endpoint_takes_no_more_than_its_share(database: Database, seed: Seed) -> None:
    busy = await endpoint(database)
    for _ in range(6):
        await _cancelled(database, await seed.job())
    quiet = await endpoint(database)
    await _cancelled(database, await seed.job())
    rows = {row.seq: row.endpoint_id for row in await deliveries(database)}
    assert sorted(rows[seq] for seq in await due(database)) == sorted([busy] * 4 + [quiet])


async def test_a_sender_that_fell_silent_is_replaced_and_can_write_nothing(database: Database, seed: Seed) -> None:
    await _two_events(database, seed)
    (first,) = await due(database)
    silent = await claim(database, first)
    assert silent is not None
    async with database.begin() as session:
        await session.execute(update(WebhookDelivery).where(WebhookDelivery.seq == first).values(due_at=now() - 1))
    assert await due(database) == [first]
    assert await claim(database, first, attempts=0) is None  # looked before the attempt that fell silent
    assert await claim(database, first, attempts=1) is not None
    async with database.begin() as session:
        assert not await repository.delivered(session, silent, 200)
    assert (await deliveries(database))[0].state == "pending"


async def test_a_disabled_endpoint_gives_up_what_waits(database: Database, seed: Seed) -> None:
    ours = await _two_events(database, seed)
    async with database.begin() as session:
        await repository.disable(session, ours, "gone")
    assert [row.state for row in await deliveries(database)] == ["given_up"] * 2
    async with database.read() as session:
        (view,) = await service.list_endpoints(session, DEFAULT_PROJECT)
    assert (view.backlog, view.endpoint.disabled_reason) == (repository.Backlog(0, 2), "gone")


async def test_the_secret_is_sealed_and_a_rotation_keeps_the_old_one_for_a_day(database: Database) -> None:
    async with database.begin() as session:
        first = await service.add(session, VAULT, DEFAULT_PROJECT, URL)
        second = await service.rotate(session, VAULT, DEFAULT_PROJECT, first.endpoint_id)
    async with database.read() as session:
        row, at = (await session.execute(select(WebhookEndpoint, now()))).one()
    assert first.secret not in row.secret + str(row.old_secret)
    assert VAULT.open(row.secret, row.id) == second.secret
    assert VAULT.open(str(row.old_secret), row.id) == first.secret
    assert (row.old_secret_until or 0) - at == pytest.approx(24 * 3600, abs=60)


async def test_another_projects_endpoint_is_not_found(database: Database) -> None:
    theirs = await endpoint(database, project_id="proj_other")
    async with database.begin() as session:
        assert await service.list_endpoints(session, DEFAULT_PROJECT) == []
        with pytest.raises(NotFound):
            await service.rotate(session, VAULT, DEFAULT_PROJECT, theirs)
        with pytest.raises(NotFound):
            await service.remove(session, DEFAULT_PROJECT, theirs)
        assert len(await service.list_endpoints(session, "proj_other")) == 1


async def test_a_removed_endpoint_takes_its_deliveries_along(database: Database, seed: Seed) -> None:
    ours = await _two_events(database, seed)
    async with database.begin() as session:
        await service.remove(session, DEFAULT_PROJECT, ours)
    assert await deliveries(database) == []


@pytest.mark.parametrize(("to", "events"), [("ftp://example.com", ()), (URL, ("fine_tuning.job.created",))])
async def test_a_bad_url_or_event_is_refused(database: Database, to: str, events: Sequence[str]) -> None:
    async with database.begin() as session:
        with pytest.raises(InvalidRequest):
            await service.add(session, VAULT, DEFAULT_PROJECT, to, events)
        issued = await service.add(session, VAULT, DEFAULT_PROJECT, URL)
        (view,) = await service.list_endpoints(session, DEFAULT_PROJECT)
    assert (view.endpoint.id, view.endpoint.events) == (issued.endpoint_id, list(EVENT_TYPES))


async def _two_events(database: Database, seed: Seed) -> str:
    """paused, then cancelled, of one job; the endpoint's id."""
    made = await endpoint(database)
    job_id = await seed.job(status="queued")
    async with database.begin() as session:
        await jobs.pause(session, DEFAULT_PROJECT, job_id)
        await jobs.cancel(session, DEFAULT_PROJECT, job_id)
    return made


async def _cancelled(database: Database, job_id: str) -> None:
    async with database.begin() as session:
        await jobs.cancel(session, DEFAULT_PROJECT, job_id)
