"""Pause and resume, over HTTP with the official client and against workers that claim, write and end at the same time.

Does not cover: the pause that a worker asks for itself (`tests/db/test_leases`).
"""

from __future__ import annotations

import asyncio

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from sqlalchemy import select

from app.core.settings import Settings
from app.core.states import JobStatus, RolloutState
from app.db.engine import Database, create_sync
from app.db.tables import Event, Job
from app.jobs import leases
from app.jobs.leases import Claim, LeaseLost
from tests.api.live_server import LiveServer
from tests.db.rows import Seed


@pytest.fixture
def seed(database: Database, settings: Settings) -> Seed:
    return Seed(database, settings)


async def claim(database: Database, job_id: str) -> Claim | None:
    async with database.begin() as session:
        return await leases.claim(session, job_id, owner="w", lease_s=60, adapter_slots=8)


async def running(database: Database, seed: Seed, step: int = 2) -> Claim:
    claimed = await claim(database, await seed.job(status="queued"))
    assert claimed is not None
    async with database.begin() as session:
        await leases.fenced(session, claimed.fence, step=step)
    return claimed


async def row(database: Database, job_id: str) -> Job:
    async with database.read() as session:
        return (await session.scalars(select(Job).where(Job.id == job_id))).one()


async def story(database: Database, job_id: str) -> list[str]:
    async with database.read() as session:
        return list(await session.scalars(select(Event.message).where(Event.job_id == job_id).order_by(Event.seq)))


async def test_a_running_job_pauses_at_once_and_goes_on_from_its_last_step(
    client: OpenAI, database: Database, seed: Seed
) -> None:
    claimed = await running(database, seed)
    await seed.rollout(claimed.job.id, RolloutState.STARTED, step=3)
    await seed.rollout(claimed.job.id, RolloutState.TRAINED, step=2)
    paused = client.fine_tuning.jobs.pause(claimed.job.id)
    assert (paused.status, paused.finished_at) == ("paused", None)
    assert paused.to_dict()["hone"]["rollouts"]["states"] == {"cancelled": 1, "trained": 1}
    assert paused.to_dict()["hone"]["activity"]["text"] == "paused by a client"
    assert paused.to_dict()["hone"]["attempt"] == claimed.fence.attempt + 1
    assert not leases.renew(create_sync(database.url), claimed.fence, 60)
    assert client.fine_tuning.jobs.resume(claimed.job.id).status == "queued"
    again = await claim(database, claimed.job.id)
    assert again is not None
    assert again.fence.attempt > claimed.fence.attempt
    assert await story(database, claimed.job.id) == [
        "Fine-tuning job started",
        "Fine-tuning job paused after step 2 by a client",
        "Resume requested; the job is queued and goes on from step 2",
        "Fine-tuning job resumed from step 2",
    ]


async def test_the_worker_of_a_paused_job_can_write_nothing_even_after_a_resume(
    client: OpenAI, database: Database, seed: Seed
) -> None:
    claimed = await running(database, seed)
    client.fine_tuning.jobs.pause(claimed.job.id)
    for _ in range(2):
        with pytest.raises(LeaseLost):
            async with database.begin() as session:
                await leases.fenced(session, claimed.fence, step=9)
        if (await row(database, claimed.job.id)).status == "paused":
            client.fine_tuning.jobs.resume(claimed.job.id)
            assert await claim(database, claimed.job.id) is not None
    assert (await row(database, claimed.job.id)).step == 2


async def test_a_queued_job_waits_paused_and_starts_as_if_nothing_had_been(
    client: OpenAI, database: Database, seed: Seed
) -> None:
    job_id = await seed.job(status="queued", queue_reason="waits for adapter slots")
    paused = client.fine_tuning.jobs.pause(job_id)
    assert (paused.status, paused.to_dict()["hone"]["queue_reason"]) == ("paused", None)
    async with database.read() as session:
        assert [job.id for job in await leases.waiting(session)] == []
    assert await claim(database, job_id) is None
    client.fine_tuning.jobs.resume(job_id)
    claimed = await claim(database, job_id)
    assert claimed is not None
    assert claimed.fence.attempt == 1
    assert (await story(database, job_id))[-1] == "Fine-tuning job started"


async def test_a_second_pause_changes_nothing(client: OpenAI, database: Database, seed: Seed) -> None:
    claimed = await running(database, seed)
    first = client.fine_tuning.jobs.pause(claimed.job.id)
    second = client.fine_tuning.jobs.pause(claimed.job.id)
    assert (second.status, second.to_dict()["hone"]["attempt"]) == ("paused", first.to_dict()["hone"]["attempt"])
    assert len(await story(database, claimed.job.id)) == 2


@pytest.mark.parametrize("status", ["validating_files", "succeeded", "failed", "cancelled"])
async def test_what_cannot_be_paused_is_refused_with_its_status(client: OpenAI, seed: Seed, status: str) -> None:
    job_id = await seed.job(status=status)
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.pause(job_id)
    assert f'Cannot pause a job {job_id} that has status "{status}"; only a queued' in caught.value.message


@pytest.mark.parametrize("status", [s.value for s in JobStatus if s is not JobStatus.PAUSED])
async def test_only_a_paused_job_can_be_resumed(client: OpenAI, seed: Seed, status: str) -> None:
    job_id = await seed.job(status=status)
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.resume(job_id)
    assert f'Cannot resume a job {job_id} that has status "{status}"' in caught.value.message


async def test_a_paused_job_can_be_cancelled(client: OpenAI, seed: Seed) -> None:
    job_id = await seed.job(status="paused")
    assert client.fine_tuning.jobs.cancel(job_id).status == "cancelled"


async def test_a_resume_gives_the_job_its_crash_budget_back(client: OpenAI, database: Database, seed: Seed) -> None:
    job_id = await seed.job(status="paused", crashes=2)
    client.fine_tuning.jobs.resume(job_id)
    assert (await row(database, job_id)).crashes == 0


async def test_another_project_can_do_neither(live_server: LiveServer, other_key: str, seed: Seed) -> None:
    job_id = await seed.job(status="queued")
    with OpenAI(base_url=live_server.base_url, api_key=other_key, max_retries=0) as stranger:
        for call in (stranger.fine_tuning.jobs.pause, stranger.fine_tuning.jobs.resume):
            with pytest.raises(openai.NotFoundError):
                call(job_id)


async def test_twenty_pauses_and_claims_at_once_leave_one_pause_and_no_owner(
    async_client: AsyncOpenAI, database: Database, seed: Seed
) -> None:
    job_id = await seed.job(status="queued")
    claims = [claim(database, job_id) for _ in range(10)]
    pauses = [async_client.fine_tuning.jobs.pause(job_id) for _ in range(10)]
    found = await asyncio.gather(*(one for pair in zip(claims, pauses, strict=True) for one in pair))
    won = [one for one in found if isinstance(one, Claim)]
    after = await row(database, job_id)
    assert (after.status, after.lease_owner, after.reserved_slots) == ("paused", None, 0)
    assert len(won) <= 1
    assert sum("paused" in text for text in await story(database, job_id)) == 1
    for claimed in won:
        with pytest.raises(LeaseLost):
            async with database.begin() as session:
                await leases.fenced(session, claimed.fence)


async def test_a_pause_and_the_end_of_the_job_at_once_agree_on_one_of_them(
    async_client: AsyncOpenAI, database: Database, seed: Seed
) -> None:
    for _ in range(5):
        claimed = await running(database, seed)

        async def end(claimed: Claim = claimed) -> None:
            async with database.begin() as session:
                await leases.finish(session, claimed.fence, JobStatus.SUCCEEDED)

        ended, paused = await asyncio.gather(
            end(), async_client.fine_tuning.jobs.pause(claimed.job.id), return_exceptions=True
        )
        status = (await row(database, claimed.job.id)).status
        assert (status, type(ended), isinstance(paused, openai.BadRequestError)) in (
            ("paused", LeaseLost, False),
            ("succeeded", type(None), True),
        )
