"""One attempt at a job, from the claim to the last checkpoint: sample, train, publish, prove, evaluate.

Does not cover: the lease, signals and what a failure means for the row — see `workers.supervisor`. Strictly on-policy:
batch k is sampled from version k-1, so sampler and trainer take turns; overlap comes with staleness (design §6.6).
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from app.checkpoints import names, store
from app.core.settings import Settings
from app.core.states import RolloutState
from app.db.engine import Database
from app.files.storage import Storage
from app.jobs.leases import Claim
from app.samplers.service import Samplers
from workers.batch import write_batch
from workers.heartbeat import Heartbeat
from workers.messages import LoraSpec, Progress, Published, Start, Step, StepDone
from workers.publication import Publisher
from workers.registry import Registry, StepRecord
from workers.results import table, write_result_file
from workers.rollouts import metrics
from workers.rollouts.batch import Selected, Verdict, select
from workers.rollouts.pool import Pool, StepRollouts, TooManyFailures
from workers.rollouts.recorder import Recorder
from workers.rollouts.stream import RowStream
from workers.rollouts.trajectory import Setting
from workers.rollouts.types import Ended, Group
from workers.sampler.policy import ServedPolicy
from workers.setup import Inputs, JobFailure, dial_endpoints, read_inputs, write_canary
from workers.trainer_link import TrainerLink
from workers.validation import Validator

log = logging.getLogger("hone.run")

CLOSE_S = 20.0
EMPTY_STEPS_LIMIT = 3  # steps in a row without anything to learn from


class Run:
    """One attempt. `execute` returns when the job has succeeded; every other end is an exception."""

    def __init__(self, settings: Settings, database: Database, claim: Claim, heartbeat: Heartbeat) -> None:
        job, fence = claim.job, claim.fence
        self.settings = settings
        self.database = database
        self.claim = claim
        self.job = job
        self.dir = settings.jobs_dir / job.id / f"a{fence.attempt}"
        self.adapters_dir = settings.adapters_dir / job.id
        self.prefix = f"{job.id}-a{fence.attempt}"
        self.executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix="render")
        self.samplers = Samplers(database, settings)
        self.policy = ServedPolicy(self.samplers, database, job.model, self.prefix)
        self.trainer = TrainerLink(
            log=settings.logs_dir / f"{job.id}.trainer.log",
            environment=settings.environment(),
            silence_s=settings.trainer_silence_s,
        )
        self.seconds: dict[str, float] = {str(name): float(value) for name, value in (job.seconds or {}).items()}
        self.recorder = Recorder(database, fence, settings.traces_dir, self.seconds)
        self.recorder.on_flush = heartbeat.moved
        self.heartbeat = heartbeat
        self.registry = Registry(database, fence)
        self.final_name = names.fine_tuned(job.model, settings.organization_id, job.suffix, job.id)
        cursor = claim.snapshot.cursor if claim.snapshot else {}
        self.step = claim.snapshot.step if claim.snapshot else 0
        self.version = int(cursor.get("version", 0))
        self.position = int(cursor.get("position", 0))
        self.empty_steps = int(cursor.get("empty_steps", 0))
        self.snapshot = (claim.snapshot.path, claim.snapshot.sha256) if claim.snapshot else ("", "")
        self.last_data: dict[str, Any] = {}
        self.publisher: Publisher | None = None  # once the engines run

    async def execute(self) -> None:
        """Run with the flusher and the pin keeper beside; a lost lease in either ends the run."""
        main = asyncio.create_task(self._main(), name="run")
        beside = [asyncio.create_task(self.recorder.run()), asyncio.create_task(self.policy.keep())]
        try:
            done, _ = await asyncio.wait([main, *beside], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (main, *beside):
                task.cancel()
            await asyncio.gather(main, *beside, return_exceptions=True)

    async def close(self) -> None:
        """The last call, however the attempt ended: give back what it holds, close what it opened."""
        await self.give_back()
        await self.samplers.close()
        self.executor.shutdown(wait=False, cancel_futures=True)

    async def give_back(self) -> None:
        """What this attempt holds in samplers and on disk; writes nothing about the job.

        Its versions are never used again: a resume starts from a snapshot. Snapshots go when the job is over.
        """
        try:
            async with asyncio.timeout(CLOSE_S):
                await self.policy.retire_all()
            if await self.registry.job_is_over():
                job_dir = self.settings.jobs_dir / self.job.id
                leftovers = [self.adapters_dir, *job_dir.glob("a*/snapshots"), *job_dir.glob("a*/batches")]
                await asyncio.to_thread(_remove, leftovers)
        except (TimeoutError, SQLAlchemyError) as error:
            log.warning("%s: left files behind: %s", self.prefix, error)

    async def _main(self) -> None:
        inputs = await self._prepare()
        await self._start_engines(inputs)
        pool = Pool(
            Setting(
                job_id=self.job.id,
                renderer=inputs.renderer,
                policy=self.policy,
                http=inputs.http,
                endpoints=inputs.endpoints,
                grader=inputs.grader,
                limits=inputs.limits,
                executor=self.executor,
            ),
            self.recorder,
            group_size=inputs.plan.group_size,
            limit=self.settings.max_concurrent_rollouts,
        )
        validator = Validator(pool, self.recorder, inputs.valid, inputs.plan.eval_samples)
        try:
            history = await self.registry.metrics_history()
            if not any(data["step"] == 0 and "valid" in data for data in history):
                self.last_data = {"step": 0, "total_steps": inputs.plan.total_steps}
                await self._validate(inputs, validator)  # the baseline, on v0 = the base
            elif self.step and self._evaluates(inputs) and not await self.registry.has_checkpoint(self.step):
                self.last_data = next(data for data in reversed(history) if data["step"] == self.step)
                await self._validate(inputs, validator)
                await self._checkpoint()
            stream = RowStream(inputs.train, inputs.plan.seed, self.position)
            while self.step < inputs.plan.total_steps:
                await self._step(inputs, pool, stream)
                if self._evaluates(inputs):
                    await self._validate(inputs, validator)
                    await self._checkpoint()
        except TooManyFailures as error:
            raise JobFailure(error.state, f"The job stopped: {error}") from error
        await self._finish()

    # --- before the first rollout -----------------------------------------------------------------------------------

    async def _prepare(self) -> Inputs:
        with self._phase("startup"):
            self.recorder.activity("reading files and dialling endpoints")
            inputs = await read_inputs(self.settings, self.job, self.executor)
            await dial_endpoints(inputs)
        return inputs

    async def _start_engines(self, inputs: Inputs) -> None:
        """A live sampler, then the trainer (it takes the sampler's dtype), then its first version served and proved."""
        with self._phase("startup"):
            self.recorder.activity(f"waiting for a sampler of {inputs.model.id}")
            sampler = await self.policy.start(self.settings.sampler_start_s)
            served = str(sampler.info.get("dtype", "bfloat16"))
            wanted = self.settings.trainer_dtype
            dtypes = (served, served if wanted == "auto" else wanted)
            await self.policy.clear_leftovers(self.job.id, self.adapters_dir)
            self.recorder.activity("starting the trainer")
            self.trainer.on_progress = self._on_progress
            ready = await self.trainer.start(
                Start(
                    job_id=self.job.id,
                    model_path=str(inputs.model.path),
                    adapters_dir=str(self.adapters_dir),
                    snapshots_dir=str(self.dir / "snapshots"),
                    adapter_prefix=self.prefix,
                    canary=write_canary(self.dir / "canary.json", inputs.canary),
                    seed=self.job.seed,
                    total_steps=inputs.plan.total_steps,
                    learning_rate=inputs.plan.learning_rate,
                    loss_type=inputs.plan.loss_type,
                    lora=LoraSpec(inputs.plan.lora_rank, inputs.plan.lora_alpha, inputs.plan.lora_targets),
                    dtype=dtypes[1],
                    threads=self.settings.cpu_threads,
                    snapshot=self.snapshot[0] or None,
                    temperature=inputs.plan.temperature,
                )
            )
        if ready.step != self.version:
            raise JobFailure(
                "resume_mismatch", f"the trainer stands at version {ready.step}, the job at {self.version}"
            )
        self.publisher = Publisher(self.policy, inputs.canary, dtypes)
        await self._publish(ready.adapter)

    def _on_progress(self, progress: Progress) -> None:
        total = f" of {progress.total}" if progress.total else ""
        self.recorder.activity(f"step {self.step + 1}: {progress.phase} {progress.done}{total}")

    # --- a training step --------------------------------------------------------------------------------------------

    async def _step(self, inputs: Inputs, pool: Pool, stream: RowStream) -> None:
        """Sample a batch at the current version, train on it, publish and prove the next one, register the step."""
        began = time.monotonic()
        step = self.step + 1
        self.recorder.describe = lambda: f"step {step}: sampling, {pool.describe()}"
        rollouts = await pool.step(step, self.version, stream, inputs.plan.batch_size)
        self.recorder.describe = lambda: None
        self._share(rollouts.wall_s, [member for group, _ in rollouts.groups for member in group.members])
        selected = select(rollouts.of(Verdict.TRAINABLE), inputs.plan.max_trained_rollouts)
        data = metrics.step_data(step, inputs.plan.total_steps, rollouts)
        await self.recorder.flush()
        done, batch_file = None, self.dir / "batches" / f"{step}.safetensors"
        if selected.rows:
            done = await self._update(inputs, step, selected, batch_file)
            data |= self._trainer_data(done)
        data["timing"] = {
            "step": {
                "sampling": rollouts.wall_s,
                "training": done.seconds.get("update", 0.0) if done else 0.0,
                "full_iteration": time.monotonic() - began,
            }
        }
        cursor = {
            "position": stream.position,
            "version": self.version,
            "empty_steps": 0 if done else self.empty_steps + 1,
        }
        stale = await self.registry.step_done(
            StepRecord(
                step=step,
                snapshot=self.snapshot[0],
                snapshot_sha256=self.snapshot[1],
                cursor=cursor,
                trained_tokens=int(done.metrics.get("trained_tokens", 0)) if done else 0,
                settled=_settled(rollouts, selected),
                advantages=selected.advantages,
                events=[(metrics.message(data), data)],
            )
        )
        self.step, self.last_data = step, data
        await asyncio.to_thread(_remove, [Path(path) for path in stale if path] + [batch_file])
        await self._note_empty(rollouts, int(cursor["empty_steps"]))

    async def _update(self, inputs: Inputs, step: int, selected: Selected, batch_file: Path) -> StepDone:
        with self._phase("training"):
            self.recorder.activity(f"step {step}: training on {len(selected.rows)} rollouts")
            sha256 = await asyncio.to_thread(write_batch, batch_file, selected.rows)
            done = await self.trainer.step(Step(self.version + 1, str(batch_file), sha256))
        previous, self.version = self.version, self.version + 1
        self.snapshot = (done.snapshot, done.snapshot_sha256)
        await self._publish(done.adapter)
        await self.policy.retire(previous)
        return done

    async def _publish(self, adapter: Published) -> None:
        with self._phase("publication"):
            self.recorder.activity(f"publishing version {adapter.version}")
            assert self.publisher is not None
            await self.publisher.publish(adapter)

    async def _note_empty(self, rollouts: StepRollouts, empty: int) -> None:
        """A step without signal moves nothing; say why, and stop when it goes on like this."""
        self.empty_steps = empty
        if not empty:
            return
        constant = rollouts.of(Verdict.NO_SIGNAL)
        rewards = sorted({round(group.graded[0].reward, 4) for group in constant})
        figures = f"{len(constant)} of {len(rollouts.groups)} groups gave every rollout the same reward {rewards[:5]}"
        meaning = (
            "too easy" if rewards and min(rewards) >= 1.0 else "too hard" if rewards == [0.0] else "constant grader"
        )
        message = f"Step {self.step} had nothing to learn from ({meaning}): {figures}"
        await self.recorder.event(message, level="warn", data={"step": self.step, "rewards": rewards[:50]})
        if empty >= EMPTY_STEPS_LIMIT and self.version == 0:
            raise JobFailure("no_signal", f"{empty} steps in a row had nothing to learn from ({meaning}): {figures}")

    # --- validation and checkpoints ---------------------------------------------------------------------------------

    def _evaluates(self, inputs: Inputs) -> bool:
        plan = inputs.plan
        return self.step == plan.total_steps or self.step % plan.eval_interval == 0

    async def _validate(self, inputs: Inputs, validator: Validator) -> None:
        """Sampled after every interval; greedy too at the baseline and at the end."""
        greedy = self.step in (0, inputs.plan.total_steps)
        self.last_data = await validator.run(self.step, self.version, self.last_data, greedy=greedy)
        await self.registry.metrics(metrics.message(self.last_data), self.last_data)

    async def _checkpoint(self) -> None:
        """Publish the current version as a public checkpoint; the last step's bears the final name."""
        step = self.step
        final = step == (self.job.total_steps or step)
        name = self.final_name if final else names.at_step(self.final_name, step)
        target = self.settings.checkpoints_dir / self.job.id / f"a{self.claim.fence.attempt}" / f"step-{step}"
        facts = {"job": self.job.id, "step": step, "version": self.version, "base_model": self.job.model, "name": name}
        source = Path(self.policy.path(self.version))
        sha256 = await asyncio.to_thread(store.publish, source, target, facts)
        data = self.last_data
        shown = {
            "step": step,
            "train_mean_reward": data.get("train_mean_reward"),
            "full_valid_mean_reward": data.get("full_valid_mean_reward"),
            "completion_tokens_mean": data.get("completion_tokens_mean"),
            "tool_calls_mean": data.get("tool_calls_mean"),
        }
        await self.registry.checkpoint(step, name, self.job.model, target, sha256, shown)

    async def _finish(self) -> None:
        """Result file and final model."""
        storage = Storage(self.settings.files_dir)
        text = table(await self.registry.metrics_history())
        result_file, stored = await asyncio.to_thread(write_result_file, storage, text)
        await self.recorder.finish()
        await asyncio.to_thread(self.heartbeat.stop)  # or it would find the lease gone and call that a loss
        await self.registry.succeeded(self.final_name, result_file, stored)

    # --- time -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    def _share(self, wall_s: float, members: Sequence[Ended]) -> None:
        """Split a sampling phase's wall time by what its trajectories spent their time on, so that phases add up."""
        spent = {name: sum(m.trajectory.seconds[name] for m in members) for name in ("sampling", "tools", "grading")}
        total = sum(spent.values()) or 1.0
        for name, value in spent.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + wall_s * value / total

    def _trainer_data(self, done: StepDone) -> dict[str, Any]:
        return {"policy": {**done.metrics, "version": self.version}, "update_seconds": dict(done.seconds)}


def _settled(rollouts: StepRollouts, selected: Selected) -> dict[RolloutState, list[str]]:
    def graded(groups: Sequence[Group]) -> list[str]:
        return [member.key.id for group in groups for member in group.graded]

    return {
        RolloutState.TRAINED: [ended.key.id for ended in selected.chosen],
        RolloutState.NOT_SELECTED: [ended.key.id for ended in selected.left_out],
        RolloutState.NO_SIGNAL: graded(rollouts.of(Verdict.NO_SIGNAL)),
        RolloutState.GROUP_DROPPED: graded(rollouts.of(Verdict.DROPPED)),
    }


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
