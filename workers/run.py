"""One attempt at a job, from the claim to the last checkpoint: what it needs, in which order it starts, how it ends.

Does not cover: the lease, signals and what a failure means for the row — see `workers.supervisor`; the steps between
start and end — see `workers.training`.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from app.checkpoints import names
from app.core.settings import Settings
from app.db.engine import Database
from app.files import service as files
from app.files.storage import Storage
from app.jobs.leases import Claim
from app.net.endpoint import show_url
from app.samplers.service import LiveSampler, Samplers
from app.storage.build import open_store
from workers import devices
from workers.budget import Budget
from workers.clock import Clock
from workers.devices import NotEnoughGpus, TrainerShare
from workers.evaluation import Evaluations
from workers.heartbeat import Heartbeat
from workers.launch import BadLaunch, Launch, read_launch
from workers.messages import LoraSpec, Start
from workers.pipeline import Pipeline
from workers.publication import PublicationUnproved, Publisher
from workers.registry import Registry
from workers.results import table, write_result_file
from workers.rollouts.congestion import Congestion
from workers.rollouts.pool import Pool, TooManyFailures
from workers.rollouts.recorder import Recorder
from workers.rollouts.shipping import MB, Shipping
from workers.rollouts.stream import Consumed, RowStream
from workers.rollouts.trajectory import Setting
from workers.sampler import engines
from workers.sampler.policy import ServedPolicy
from workers.sampler.proof import Unproved
from workers.sampler.proof.files import AdapterFiles
from workers.setup import Inputs, JobFailure, check_snapshot, dial_endpoints, read_inputs, write_canary
from workers.storing import Checkpoints, persist
from workers.trainer_link import TrainerLink
from workers.training import Parts, Standing, Training
from workers.validation import Validator

log = logging.getLogger("hone.run")

CLOSE_S = 20.0


class Run:
    """One attempt. `execute` returns when the job has succeeded; every other end is an exception."""

    def __init__(self, settings: Settings, database: Database, claim: Claim, heartbeat: Heartbeat) -> None:
        job, fence = claim.job, claim.fence
        self.settings = settings
        self.database = database
        self.claim = claim
        self.job = job
        self.dir = settings.jobs_dir / job.id / f"a{fence.attempt}"
        self.storage = Storage.of(settings)
        self.adapters_dir = settings.adapters_dir / job.id
        self.prefix = f"{job.id}-a{fence.attempt}"
        self.endpoints = AsyncExitStack()  # the connections to them, once there are any
        self.executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix="render")
        self.samplers = Samplers(database, settings)
        self.policy = ServedPolicy(self.samplers, database, job.model, self.prefix)
        self.trainer = TrainerLink(
            log=settings.logs_dir / f"{job.id}.trainer.log",
            environment={},
            silence_s=settings.trainer_silence_s,
        )
        self.seconds: dict[str, float] = {str(name): float(value) for name, value in (job.seconds or {}).items()}
        self.recorder = Recorder(database, fence, settings.traces_dir, self.seconds)
        self.recorder.on_flush = heartbeat.moved
        self.shipping = Shipping(
            open_store(settings, "traces"),
            settings.traces_dir,
            job.id,
            fence.attempt,
            settings.traces_max_mb_per_job * MB,
        )
        self.heartbeat = heartbeat
        self.registry = Registry(database, fence)
        self.budget = Budget(database, fence)
        self.final_name = names.fine_tuned(job.model, settings.organization_id, job.suffix, job.id)
        cursor = claim.snapshot.cursor if claim.snapshot else {}
        self.standing = Standing(
            step=claim.snapshot.step if claim.snapshot else 0,
            version=int(cursor.get("version", 0)),
            empty_steps=int(cursor.get("empty_steps", 0)),
            consumed=Consumed(cursor),
            snapshot=(claim.snapshot.path, claim.snapshot.sha256) if claim.snapshot else ("", ""),
        )

    async def execute(self) -> None:
        """Run with the flusher, the pin keeper and the shipping of traces beside; a lost lease in one ends the run."""
        main = asyncio.create_task(self._main(), name="run")
        duties = (self.recorder.run(), self.policy.keep(), self.shipping.run(lambda: self.standing.step))
        beside = [asyncio.create_task(duty) for duty in duties]
        try:
            done, _ = await asyncio.wait([main, *beside], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except Unproved as error:
            raise PublicationUnproved(
                f"A version in use could not be proved again: {error}",
                {"sampler": error.sampler, "reason": error.reason, **error.figures},
            ) from error
        finally:
            for task in (main, *beside):
                task.cancel()
            await asyncio.gather(main, *beside, return_exceptions=True)

    async def close(self) -> None:
        """The last call, however the attempt ended: give back what it holds, close what it opened."""
        await self.give_back()
        await self.endpoints.aclose()
        await self.samplers.close()
        self.executor.shutdown(wait=False, cancel_futures=True)

    async def give_back(self) -> None:
        """What this attempt holds in samplers and on disk; writes nothing about the job.

        Its versions are never used again: a resume starts from a snapshot. Snapshots go when the job is over.
        """
        try:
            async with asyncio.timeout(CLOSE_S):
                await self.policy.retire_all()
            over = await self.registry.job_is_over()
            if over:
                job_dir = self.settings.jobs_dir / self.job.id
                leftovers = [self.adapters_dir, *job_dir.glob("a*/snapshots"), *job_dir.glob("a*/batches")]
                await asyncio.to_thread(_remove, leftovers)
            async with asyncio.timeout(CLOSE_S):
                await self.shipping.finish(over=over)
        except (TimeoutError, SQLAlchemyError) as error:
            log.warning("%s: left files behind: %s", self.prefix, error)

    async def _main(self) -> None:
        inputs = await self._prepare()
        publisher = await self._start_engines(inputs)
        plan = inputs.plan
        congestion = Congestion(floor=plan.group_size, ceiling=self.settings.max_concurrent_rollouts)
        setting = Setting(
            job_id=self.job.id,
            renderer=inputs.renderer,
            policy=self.policy,
            http=inputs.http,
            endpoints=inputs.endpoints,
            grader=inputs.grader,
            limits=inputs.limits,
            executor=self.executor,
            gate=congestion,
            wants_json=inputs.wants_json,
        )
        pool = Pool(setting, self.recorder, congestion, group_size=plan.group_size)
        stream = RowStream(inputs.train, plan.seed, self.standing.consumed.cursor())
        training = Training(
            Parts(
                inputs=inputs,
                standing=self.standing,
                pool=pool,
                congestion=congestion,
                pipeline=Pipeline(
                    pool,
                    stream,
                    batch_size=plan.batch_size,
                    total_steps=plan.total_steps,
                    max_staleness=plan.max_staleness,
                ),
                trainer=self.trainer,
                policy=self.policy,
                publisher=publisher,
                recorder=self.recorder,
                registry=self.registry,
                budget=self.budget,
                evaluations=Evaluations(
                    Validator(pool, self.recorder, inputs.valid, plan.eval_samples),
                    self.registry,
                    self.policy,
                    {"job": self.job.id, "base_model": self.job.model},
                    Checkpoints(
                        open_store(self.settings, "checkpoints"),
                        self.settings.checkpoints_dir,
                        self.job.id,
                        self.claim.fence.attempt,
                    ),
                ),
                final_name=self.final_name,
                batches=self.dir / "batches",
            ),
            await self.registry.metrics_history(),
        )
        beside = asyncio.create_task(congestion.poll(self.policy.loads))
        try:
            await training.run()
        except (TooManyFailures, JobFailure) as error:
            await self.recorder.flush()  # what has ended is recorded as what it was, not as cancelled with the rest
            if isinstance(error, TooManyFailures):
                raise JobFailure(error.state, f"The job stopped: {error}") from error
            raise
        finally:
            beside.cancel()
            await asyncio.gather(beside, return_exceptions=True)
        await self._finish()

    # --- before the first rollout -----------------------------------------------------------------------------------

    async def _prepare(self) -> Inputs:
        with Clock(self.seconds).phase("startup"):
            self.recorder.activity("reading files and dialling endpoints")
            async with self.database.read() as session:
                wanted = filter(None, [self.job.training_file, self.job.validation_file])
                shelf = await files.shelf(session, self.storage, wanted)
            inputs = await read_inputs(self.settings, self.job, shelf, self.executor)
            self.endpoints.push_async_callback(inputs.http.aclose)
            await dial_endpoints(inputs)
            if self.claim.fence.attempt == 1:
                for warning in inputs.model_warnings:
                    await self.recorder.event(f"Chat format of {inputs.model.id}: {warning}", level="warn")
        return inputs

    async def _start_engines(self, inputs: Inputs) -> Publisher:
        """A live sampler, then the trainer (it takes the sampler's dtype), then its first version served and proved."""
        with Clock(self.seconds).phase("startup"):
            self.recorder.activity(f"waiting for a sampler of {inputs.model.id}")
            sampler = await self.policy.start(self.settings.sampler_start_s)
            _require_rank(inputs.plan.lora_rank, sampler)
            served = str(sampler.info.get("dtype", "bfloat16"))
            wanted = self.settings.trainer_dtype
            dtypes = (served, served if wanted == "auto" else wanted)
            await self.policy.clear_leftovers(self.job.id, self.adapters_dir)
            share, launch = await asyncio.to_thread(_devices, self.settings)
            self.trainer.use(share.environment())
            await self.budget.holds(len(share.gpus))
            self.recorder.activity("starting the trainer")
            if self.standing.snapshot[0]:
                await asyncio.to_thread(check_snapshot, *self.standing.snapshot)
            self.trainer.on_progress = lambda progress: self.recorder.activity(f"the trainer: {progress.phase}")
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
                    snapshot=self.standing.snapshot[0] or None,
                    temperature=inputs.plan.temperature,
                    beta=inputs.plan.kl_beta,
                    importance_range=inputs.plan.importance_range,
                    max_sequence_tv=inputs.plan.max_sequence_tv,
                    processes=launch.processes,
                    shard_base=launch.shard_base,
                    gpu_memory_share=share.memory if share.gpus else None,
                )
            )
        if ready.step != self.standing.version:
            at = self.standing.version
            raise JobFailure("resume_mismatch", f"the trainer stands at version {ready.step}, the job at {at}")
        plan = inputs.plan
        publisher = Publisher(
            self.policy,
            inputs.canary,
            # The trainer scores the canary in fp32, unless its base is split over ranks.
            (dtypes[0], dtypes[1] if launch.shard_base else "float32"),
            files=AdapterFiles(inputs.model.path, plan.lora_rank, plan.lora_alpha, plan.lora_targets),
            memory=self.settings.jobs_dir / self.job.id / "canary-v0.json",
        )
        with Clock(self.seconds).phase("publication"):
            self.recorder.activity(f"publishing version {ready.adapter.version}")
            await publisher.publish(ready.adapter)
        return publisher

    # --- the end ----------------------------------------------------------------------------------------------------

    async def _finish(self) -> None:
        """Result file and final model."""
        text = table(await self.registry.metrics_history())
        result_file, stored = await persist(lambda: write_result_file(self.storage, text))
        await self.recorder.finish()
        await asyncio.to_thread(self.heartbeat.stop)  # or it would find the lease gone and call that a loss
        await self.registry.succeeded(self.final_name, result_file, stored)


def _require_rank(rank: int, sampler: LiveSampler) -> None:
    """Raises `JobFailure` for an adapter that the sampler was not started for."""
    highest = sampler.info.get("max_lora_rank")
    if highest is not None and rank > int(highest):
        raise JobFailure(
            "lora_rank_too_high",
            f"hone.lora_rank {rank} is above {highest}, the highest that the sampler at {show_url(sampler.url)} was "
            "started with; ask for less, or set HONE_SAMPLER_MAX_LORA_RANK and restart",
            "hone.lora_rank",
        )


def _devices(settings: Settings) -> tuple[TrainerShare, Launch]:
    """What the trainer may take of this host's GPUs, and over how many processes. Blocking. Raises `JobFailure`."""
    try:
        share = engines.trainer_share(settings, devices.gpus())
        launch = read_launch(settings.trainer_launch) if settings.trainer_launch else Launch(max(1, len(share.gpus)))
    except (engines.NoEngine, NotEnoughGpus, BadLaunch) as error:
        raise JobFailure("no_room_to_train", str(error)) from error
    return share, launch


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
