"""A whole attempt with a sampler and a trainer in memory: the order of things, resume, and the other ends."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from app.checkpoints import store
from app.core.settings import Settings
from app.core.states import RolloutState
from app.db.engine import Database, now
from app.db.tables import Checkpoint, Event, Job, Rollout
from app.jobs import leases, service
from app.jobs.leases import LeaseLost
from app.rendering.tokens import TextTokenizer
from app.samplers.client import Completion, CompletionRequest
from tests.db.rows import Seed, dataset
from tests.tiny import make_weightless_llama
from tests.unit.workers.adapter_files import RANK, TARGETS, write_adapter
from tests.unit.workers.fake_engine import FakeEngine, FakeSamplers
from tests.unit.workers.test_setup_of_run import PLAN as ANY_PLAN
from workers import supervisor
from workers.batch import TrainingRow, read_batch
from workers.budget import BudgetSpent
from workers.messages import Published, Ready, Start, Step, StepDone
from workers.publication import PublicationUnproved
from workers.rollouts import recorder as recording
from workers.run import Run
from workers.sampler.policy import ServedPolicy
from workers.setup import JobFailure
from workers.trainer_link import TrainerDied

PLAN = replace(ANY_PLAN, lora_rank=RANK, lora_alpha=2 * RANK, lora_targets=TARGETS)
TOTAL = PLAN.total_steps


class FakeTrainer:
    """Publishes what it is asked to; `dies_at` a version, and counts from the snapshot that it is given."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.dies_at = dies_at
        self.batches: dict[int, list[TrainingRow]] = {}
        self.begun: Start
        self.stopped = False
        self.on_progress: Any = None
        self.before_step: Callable[[Step], Awaitable[None]] | None = None

    def use(self, environment: Mapping[str, str]) -> None:
        assert environment == {}  # no GPU here

    async def start(self, message: Start) -> Ready:
        self.begun = message
        version = int(Path(message.snapshot).name) if message.snapshot else 0
        return Ready(version, self._publish(version), 0.0)

    async def step(self, message: Step) -> StepDone:
        if self.before_step is not None:
            await self.before_step(message)
        self.batches[message.step] = read_batch(Path(message.batch), message.sha256)
        if message.step == self.dies_at:
            raise TrainerDied("the trainer's process ended (signal 9)")
        snapshot = Path(self.begun.snapshots_dir) / str(message.step)
        snapshot.mkdir(parents=True)
        (snapshot / "manifest.json").write_bytes(b"{}")
        digest = hashlib.sha256(b"{}").hexdigest()
        figures = {"loss": 0.1, "trained_tokens": 5.0}
        return StepDone(message.step, self._publish(message.step), str(snapshot), digest, figures, {"update": 0.01})

    def _publish(self, version: int) -> Published:
        name = f"{self.begun.adapter_prefix}-v{version}"
        path = Path(self.begun.adapters_dir) / name
        sha256 = write_adapter(path, fill=0.1 + version)
        canary = json.loads(Path(self.begun.canary).read_text())
        (path / "canary.json").write_text(json.dumps([[-1.0] * (len(ids) - 1) for ids in canary]))
        return Published(version, name, str(path), sha256, str(path / "canary.json"))

    async def stop(self) -> None:
        self.stopped = True

    def kill_group(self) -> None:
        self.stopped = True


class Beat:
    stopped = False

    def moved(self) -> None:
        return None

    def stop(self) -> None:
        self.stopped = True


class Stage:
    """One job with its files and one sampler; each `attempt` claims it and runs it."""

    def __init__(self, settings: Settings, database: Database, samplers: FakeSamplers, engine: FakeEngine) -> None:
        self.settings, self.database, self.samplers, self.engine = settings, database, samplers, engine
        self.tokens = TextTokenizer.load(settings.models_dir / "tiny", name="tiny")
        self.end = int(self.tokens.convert_tokens_to_ids("<|im_end|>"))
        self.job_id = ""
        self.right = itertools.cycle([True, False])
        engine.before = self.answer

    async def answer(self, request: CompletionRequest) -> Completion:
        """Says the number it was asked for, or nonsense, in turns."""
        assert request.model in self.engine.adapters
        asked = self.tokens.decode(list(request.prompt_ids)).split("Say ")[1].split("<")[0]
        said = self.tokens.encode(asked if next(self.right) else "no")
        ids = (*said, self.end)
        return Completion(request.model, ids, (-0.5,) * len(ids), "", "stop", None, len(request.prompt_ids), None)

    async def attempt(self, trainer: FakeTrainer) -> Run:
        async with self.database.begin() as session:
            claim = await leases.claim(session, self.job_id, owner="me", lease_s=60, adapter_slots=8)
        assert claim is not None
        run = Run(self.settings, self.database, claim, Beat())  # type: ignore[arg-type]
        await run.samplers.close()
        run.samplers = self.samplers
        run.policy = ServedPolicy(self.samplers, self.database, "tiny", run.prefix)
        run.trainer = trainer  # type: ignore[assignment]
        return run

    async def end_of(self, run: Run) -> BaseException | None:
        """Run to the end and let the supervisor draw its conclusion."""
        work = asyncio.create_task(run.execute())
        await asyncio.wait_for(asyncio.gather(work, return_exceptions=True), 60)
        await supervisor._conclude(self.settings, self.database, run.claim, work)
        await run.give_back()
        return None if work.cancelled() else work.exception()

    async def replan(self, **values: Any) -> None:
        async with self.database.begin() as session:
            await session.execute(update(Job).values(plan=replace(PLAN, **values).as_dict()))

    async def all_of(self, table: Any) -> list[Any]:
        async with self.database.read() as session:
            return list((await session.scalars(select(table))).all())


@pytest.fixture
async def stage(settings: Settings, database: Database, seed: Seed, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(recording, "FLUSH_S", 0.02)
    make_weightless_llama(settings.models_dir / "tiny")
    samplers = FakeSamplers(database, settings)
    made = Stage(settings, database, samplers, await samplers.add("a"))
    files = {"training_file": await seed.file(dataset(6)), "validation_file": await seed.file(dataset(2, 50))}
    made.job_id = await seed.job(status="queued", plan=PLAN.as_dict(), total_steps=TOTAL, suffix="x", **files)
    async with database.begin() as session:
        await session.execute(update(Job).values(total_steps=TOTAL))
    yield made
    await samplers.close()


def states(rollouts: list[Rollout]) -> Counter[str]:
    return Counter(row.state for row in rollouts)


def rows_in_order(rollouts: list[Rollout]) -> list[int]:
    """The dataset rows of a step's groups, in the order in which the stream gave them."""
    return list(dict(sorted((row.group, row.row) for row in rollouts)).values())


async def test_a_job_trains_evaluates_and_succeeds(stage: Stage) -> None:
    trainer = FakeTrainer()
    run = await stage.attempt(trainer)
    assert await stage.end_of(run) is None
    (job,) = await stage.all_of(Job)
    assert (job.status, job.step, job.trained_tokens, job.fine_tuned_model) == ("succeeded", 3, 15, run.final_name)
    rollouts = await stage.all_of(Rollout)
    assert set(states(rollouts)) <= {"trained", "evaluated", "no_signal", "not_selected"}
    assert states(rollouts)["evaluated"] == 2 * 4 + 2 * 2  # the baseline and three steps; greedy first and last
    assert sorted(trainer.batches) == [1, 2, 3]
    for rows in trainer.batches.values():
        assert abs(sum(row.advantage for row in rows)) < 1e-5
    checkpoints = [row.name for row in await stage.all_of(Checkpoint)]
    assert checkpoints == [f"{run.final_name}:ckpt-step-1", f"{run.final_name}:ckpt-step-2", run.final_name]
    assert all(Path(row.path, "manifest.json").exists() for row in await stage.all_of(Checkpoint))
    said = [event.message for event in await stage.all_of(Event)]
    assert [text.split(",")[0] for text in said if text.startswith("Step ")][:2] == ["Step 0/3 ", "Step 1/3 "]
    assert said[-1] == "The job has successfully completed"
    assert stage.engine.adapters == {}
    assert not run.adapters_dir.exists()


async def test_every_rollout_of_a_step_is_sampled_from_the_version_before_it(stage: Stage) -> None:
    await stage.end_of(await stage.attempt(FakeTrainer()))
    served = Counter(request.model for request in stage.engine.requests)
    rollouts = await stage.all_of(Rollout)
    assert {(row.step, row.version) for row in rollouts if row.split == "train"} == {(1, 0), (2, 1), (3, 2)}
    assert {(row.step, row.version) for row in rollouts if row.split == "valid"} == {(0, 0), (1, 1), (2, 2), (3, 3)}
    assert served == Counter(f"{stage.job_id}-a1-v{row.version}" for row in rollouts)


async def test_a_snapshot_that_is_not_the_registered_one_is_not_trained_from(stage: Stage) -> None:
    assert isinstance(await stage.end_of(await stage.attempt(FakeTrainer(dies_at=3))), TrainerDied)
    run = await stage.attempt(FakeTrainer())
    (Path(run.standing.snapshot[0]) / "manifest.json").write_bytes(b"another")
    error = await stage.end_of(run)
    assert isinstance(error, JobFailure)
    assert error.code == "snapshot_changed"


async def test_after_a_crash_the_job_goes_on_from_its_last_step_with_the_same_rows(stage: Stage) -> None:
    error = await stage.end_of(await stage.attempt(FakeTrainer(dies_at=3)))
    assert isinstance(error, TrainerDied)
    before = {row.id for row in await stage.all_of(Rollout)}
    trainer = FakeTrainer()
    run = await stage.attempt(trainer)
    assert (run.standing.step, run.standing.version) == (2, 2)
    assert await stage.end_of(run) is None
    assert (sorted(trainer.batches), Path(trainer.begun.snapshot or "").name) == ([3], "2")
    rollouts = await stage.all_of(Rollout)
    lost = [row for row in rollouts if row.id in before and row.step == 3]
    assert states(lost) == {"rolled_back": len(lost)}
    again = [row for row in rollouts if row.step == 3 and row.split == "train" and row.id not in before]
    assert rows_in_order(again)[: PLAN.batch_size] == rows_in_order(lost)[: PLAN.batch_size]
    assert not [row for row in rollouts if row.step == 0 and row.attempt == 2]  # the baseline is not repeated
    assert {request.model for request in stage.engine.requests[len(before) :]} == {
        f"{stage.job_id}-a2-v2",
        f"{stage.job_id}-a2-v3",
    }


async def test_a_validation_that_was_interrupted_is_made_up_for(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = store.publish

    def dies_at_two(source: Path, target: Path, facts: dict[str, Any]) -> str:
        if facts["step"] == 2:
            raise TrainerDied("just now")
        return publish(source, target, facts)

    monkeypatch.setattr(store, "publish", dies_at_two)
    await stage.end_of(await stage.attempt(FakeTrainer()))
    assert [row.step for row in await stage.all_of(Checkpoint)] == [1]
    monkeypatch.undo()
    trainer = FakeTrainer()
    assert await stage.end_of(await stage.attempt(trainer)) is None
    assert sorted(row.step for row in await stage.all_of(Checkpoint)) == [1, 2, 3]
    assert sorted(trainer.batches) == [3]  # step 3 is not recorded before step 2 has its checkpoint


async def test_the_next_step_is_sampled_while_the_trainer_works(stage: Stage) -> None:
    """With one step of staleness; the trainer's first step returns only when the second's rollouts have all ended."""
    await stage.replan(max_staleness=1)
    ahead = asyncio.Event()

    async def until_step_two_is_sampled(message: Step) -> None:
        if message.step == 1:
            while not ahead.is_set():
                await asyncio.sleep(0.01)
                done = [row for row in await stage.all_of(Rollout) if row.step == 2 and row.split == "train"]
                if done and all(row.finished_at for row in done):
                    ahead.set()

    trainer = FakeTrainer()
    trainer.before_step = until_step_two_is_sampled
    assert await stage.end_of(await stage.attempt(trainer)) is None
    rollouts = [row for row in await stage.all_of(Rollout) if row.split == "train"]
    assert {(row.step, row.version) for row in rollouts} == {(1, 0), (2, 0), (3, 1)}
    events = [event.data for event in await stage.all_of(Event) if event.type == "metrics" and "policy" in event.data]
    assert [data["policy"]["staleness_max"] for data in events if "valid" not in data] == [0, 1, 1]
    assert stage.engine.adapters == {}  # every version is unloaded in the end


async def test_a_crash_with_a_step_sampled_ahead_gives_its_rows_back(stage: Stage) -> None:
    await stage.replan(max_staleness=1)

    async def until_step_three_has_begun(message: Step) -> None:
        while message.step == 2 and not any(row.step == 3 for row in await stage.all_of(Rollout)):
            await asyncio.sleep(0.01)

    trainer = FakeTrainer(dies_at=2)
    trainer.before_step = until_step_three_has_begun
    await stage.end_of(await stage.attempt(trainer))
    assert await stage.end_of(await stage.attempt(FakeTrainer())) is None
    rollouts = [row for row in await stage.all_of(Rollout) if row.split == "train"]
    before, again = ([row for row in rollouts if row.attempt == attempt] for attempt in (1, 2))
    assert {row.state for row in before if row.step > 1} <= {"lost", "rolled_back"}
    assert {row.step for row in before} == {1, 2, 3}
    for step in (2, 3):
        first, second = ([row for row in rows if row.step == step] for rows in (before, again))
        assert rows_in_order(second)[:2] == rows_in_order(first)[:2]
    assert {row.state for row in again} <= {"trained", "no_signal", "not_selected"}


async def test_constant_rewards_end_the_job_with_a_reason_before_it_costs_much(stage: Stage) -> None:
    stage.right = itertools.repeat(True)
    trainer = FakeTrainer()
    error = await stage.end_of(await stage.attempt(trainer))
    assert isinstance(error, JobFailure)
    assert (error.code, trainer.batches) == ("no_signal", {})
    assert "too easy" in error.message
    (job,) = await stage.all_of(Job)
    assert (job.status, job.error["code"]) == ("failed", "no_signal")
    assert set(states(await stage.all_of(Rollout))) == {"evaluated", "no_signal"}


async def test_a_sampler_that_serves_something_else_pauses_the_job_before_the_first_rollout(stage: Stage) -> None:
    async def score(model: str, ids: Any) -> list[float]:
        return [-1.5] * (len(ids) - 1)

    honest = stage.engine.score
    stage.engine.score = score  # type: ignore[method-assign]
    error = await stage.end_of(await stage.attempt(FakeTrainer()))
    assert isinstance(error, PublicationUnproved)
    assert await stage.all_of(Rollout) == []
    (job,) = await stage.all_of(Job)
    (said,) = [event for event in await stage.all_of(Event) if "paused" in event.message]
    assert (job.status, said.level) == ("paused", "error")
    assert said.data["mean_abs"] == pytest.approx(0.5)
    stage.engine.score = honest  # type: ignore[method-assign]
    async with stage.database.begin() as session:
        await service.resume(session, job.project_id, job.id)
    assert await stage.end_of(await stage.attempt(FakeTrainer())) is None


async def test_a_spent_budget_pauses_the_job_after_the_step_it_is_in_and_a_resume_grants_as_much_again(
    stage: Stage,
) -> None:
    async def two_hours_pass(message: Step) -> None:
        if message.step == 2:
            async with stage.database.begin() as session:
                await session.execute(update(Job).values(running_since=now() - 7200))

    async with stage.database.begin() as session:
        await session.execute(update(Job).values(options={"max_gpu_hours": 1.5}))
    trainer = FakeTrainer()
    trainer.before_step = two_hours_pass
    assert isinstance(await stage.end_of(await stage.attempt(trainer)), BudgetSpent)
    (job,) = await stage.all_of(Job)
    (said,) = [event for event in await stage.all_of(Event) if "paused" in event.message]
    assert (job.status, job.step, sorted(trainer.batches)) == ("paused", 2, [1, 2])
    assert (said.level, said.data["step"], said.data["gpu_hours"]) == ("warn", 2, pytest.approx(2.0, abs=0.01))
    assert not {"started"} & set(states(await stage.all_of(Rollout)))
    async with stage.database.begin() as session:
        await service.resume(session, job.project_id, job.id)
    again = FakeTrainer()
    assert await stage.end_of(await stage.attempt(again)) is None
    assert sorted(again.batches) == [3]
    assert (await stage.all_of(Job))[0].gpu_seconds == pytest.approx(7200, abs=60)


async def test_a_lease_that_is_lost_in_the_middle_ends_the_run_and_writes_nothing_more(stage: Stage) -> None:
    run = await stage.attempt(FakeTrainer())
    original = stage.answer

    async def lose(request: CompletionRequest) -> Completion:
        async with stage.database.begin() as session:
            await session.execute(update(Job).values(status="cancelled", **leases.given_up()))
            await leases.close_open_rollouts(session, stage.job_id)
        stage.engine.before = original
        return await original(request)

    stage.engine.before = lose
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(run.execute(), 30)
    rollouts = await stage.all_of(Rollout)
    assert states(rollouts) == {RolloutState.CANCELLED: len(rollouts)}
    assert all(row.reward is None for row in rollouts)


async def test_a_stopped_run_leaves_no_task_and_its_job_in_the_queue(stage: Stage) -> None:
    before = asyncio.all_tasks()
    run = await stage.attempt(FakeTrainer())
    asked = asyncio.Event()

    async def hang(request: CompletionRequest) -> Completion:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    stage.engine.before = hang
    work = asyncio.create_task(run.execute())
    await asyncio.wait_for(asked.wait(), 30)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    await supervisor._conclude(stage.settings, stage.database, run.claim, work)
    assert asyncio.all_tasks() == before
    (job,) = await stage.all_of(Job)
    assert (job.status, job.crashes) == ("queued", 0)
