"""Every rollout that was started is in exactly one state, through crashes, resumes, cancel and the end."""

from __future__ import annotations

from collections import Counter

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from app.core.ids import new_trace_id
from app.core.states import JobStatus, RolloutState
from app.db.engine import Database, now
from app.db.tables import DEFAULT_PROJECT, Job, Rollout, Snapshot
from app.jobs import leases, reconcile, service
from app.jobs.leases import Claim, Fence
from app.rollouts import ledger
from tests.db.rows import Seed

S = RolloutState


async def claim(database: Database, job_id: str) -> Claim:
    async with database.begin() as session:
        found = await leases.claim(session, job_id, owner="me", lease_s=60, adapter_slots=8)
    assert found is not None
    return found


async def start(database: Database, fence: Fence, count: int, *, step: int = 1, split: str = "train") -> list[str]:
    ids = [new_trace_id() for _ in range(count)]
    fields = {"project_id": fence.project_id, "job_id": fence.job_id, "attempt": fence.attempt, "step": step}
    fields |= {"split": split, "greedy": False, "row": 0, "group": 1, "sample": 0, "version": 0}
    fields |= dict.fromkeys(("turns", "tool_calls", "invalid_calls", "completion_tokens", "prompt_tokens"), 0)
    async with database.begin() as session:
        await leases.fenced(session, fence)
        await ledger.start(session, [{**fields, "truncated": False, "id": id_} for id_ in ids])
    return ids


async def grade(database: Database, ids: list[str], state: RolloutState = S.STARTED) -> None:
    async with database.begin() as session:
        await ledger.graded(session, [{"id": id_, "state": state.value, "reward": 0.5} for id_ in ids])


async def counts(database: Database, job_id: str) -> dict[str, int]:
    async with database.read() as session:
        return await ledger.counts(session, job_id)


async def die(database: Database, job_id: str) -> None:
    async with database.begin() as session:
        await session.execute(update(Job).where(Job.id == job_id).values(lease_until=now() - 1))
        await reconcile.take_back_expired(session, 5)


async def snapshot(database: Database, fence: Fence, step: int) -> None:
    async with database.begin() as session:
        session.add(
            Snapshot(
                project_id=fence.project_id,
                job_id=fence.job_id,
                step=step,
                attempt=fence.attempt,
                path=f"s{step}",
                sha256="x",
                cursor={},
                created_at=now(),
            )
        )


@pytest.fixture
async def queued(seed: Seed) -> str:
    return await seed.job(status="queued", plan={"max_staleness": 0})


async def test_after_a_crash_the_open_are_lost_and_the_finished_above_the_snapshot_rolled_back(
    database: Database, queued: str
) -> None:
    fence = (await claim(database, queued)).fence
    trained = await start(database, fence, 4, step=1)
    evaluated = await start(database, fence, 2, step=1, split="valid")
    await grade(database, trained)
    await grade(database, evaluated, S.EVALUATED)
    async with database.begin() as session:
        await ledger.settle(session, trained[:3], S.TRAINED)
        await ledger.settle(session, trained[3:], S.NOT_SELECTED)
    await snapshot(database, fence, 1)
    step_2 = await start(database, fence, 5, step=2)
    await grade(database, step_2[:2])  # two were graded and waited for their group
    await grade(database, step_2[2:3], S.TOOL_FAILED)
    await die(database, queued)
    assert (await claim(database, queued)).fence.attempt == 2
    assert await counts(database, queued) == {
        "trained": 3,
        "not_selected": 1,
        "evaluated": 2,
        "rolled_back": 2,
        "tool_failed": 1,
        "lost": 2,
    }


async def test_a_batch_whose_step_was_never_registered_is_rolled_back(database: Database, queued: str) -> None:
    fence = (await claim(database, queued)).fence
    ids = await start(database, fence, 3, step=1)
    await grade(database, ids)
    async with database.begin() as session:
        await ledger.settle(session, ids, S.TRAINED)
    await die(database, queued)
    await claim(database, queued)
    assert await counts(database, queued) == {"rolled_back": 3}


async def test_an_interrupted_baseline_does_not_count_twice(database: Database, queued: str) -> None:
    fence = (await claim(database, queued)).fence
    ids = await start(database, fence, 3, step=0, split="valid")
    await grade(database, ids[:1], S.EVALUATED)
    await die(database, queued)
    await claim(database, queued)
    found = await counts(database, queued)
    assert found["lost"] == 2
    assert sum(found.values()) == 3


async def test_cancelling_closes_what_is_open_in_the_same_transaction(database: Database, queued: str) -> None:
    fence = (await claim(database, queued)).fence
    ids = await start(database, fence, 4)
    await grade(database, ids[:1])
    await grade(database, ids[1:2], S.GRADER_FAILED)
    async with database.begin() as session:
        await service.cancel(session, DEFAULT_PROJECT, queued)
    assert await counts(database, queued) == {"cancelled": 3, "grader_failed": 1}
    with pytest.raises(leases.LeaseLost):
        await start(database, fence, 1)


async def test_an_outcome_cannot_reopen_or_change_an_ended_rollout(database: Database, queued: str) -> None:
    fence = (await claim(database, queued)).fence
    ids = await start(database, fence, 1)
    async with database.begin() as session:
        await ledger.settle(session, ids, S.LOST)
        await ledger.settle(session, ids, S.TRAINED)
        await ledger.graded(session, [{"id": ids[0], "state": "started", "reward": 1.0}])
    assert await counts(database, queued) == {"lost": 1}


async def test_settling_more_rows_than_a_statement_takes_keeps_advantages(database: Database, queued: str) -> None:
    fence = (await claim(database, queued)).fence
    ids = await start(database, fence, 1203)
    async with database.begin() as session:
        await ledger.settle(session, ids, S.TRAINED, {id_: float(n) for n, id_ in enumerate(ids)})
    assert await counts(database, queued) == {"trained": 1203}
    async with database.read() as session:
        rows = (await session.execute(select(Rollout.id, Rollout.advantage, Rollout.finished_at))).all()
    assert {row.id: row.advantage for row in rows} == {id_: float(n) for n, id_ in enumerate(ids)}
    assert all(row.finished_at is not None for row in rows)


async def test_the_states_sum_to_the_started_through_a_whole_life(database: Database, queued: str) -> None:
    started: Counter[str] = Counter()
    for attempt in (1, 2, 3):
        fence = (await claim(database, queued)).fence
        for step in range(attempt, attempt + 2):
            ids = await start(database, fence, 6, step=step)
            started["all"] += 6
            await grade(database, ids[:4])
            async with database.begin() as session:
                await ledger.settle(session, ids[:2], S.TRAINED)
                await ledger.settle(session, ids[2:3], S.NO_SIGNAL)
            if step == attempt:
                await snapshot(database, fence, step)
        assert sum((await counts(database, queued)).values()) == started["all"]
        if attempt < 3:
            await die(database, queued)
    async with database.begin() as session:
        await leases.finish(session, fence, JobStatus.SUCCEEDED)
    found = await counts(database, queued)
    assert sum(found.values()) == started["all"]
    assert S.STARTED not in found


async def test_a_state_that_is_not_in_the_list_is_ruled_out_by_the_table(database: Database, queued: str) -> None:
    fence = (await claim(database, queued)).fence
    ids = await start(database, fence, 1)
    for values in ({"state": "forgotten", "finished_at": 1.0}, {"state": "trained", "finished_at": None}):
        with pytest.raises(IntegrityError):
            async with database.begin() as session:
                await session.execute(update(Rollout).where(Rollout.id == ids[0]).values(**values))


async def test_a_trace_id_is_used_once(database: Database, queued: str, seed: Seed) -> None:
    await seed.rollout(queued, id="trace_x")
    with pytest.raises(IntegrityError):
        await seed.rollout(queued, id="trace_x")
