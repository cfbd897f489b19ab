"""The training steps of an attempt: take a batch, update, publish and prove the new version, record, evaluate.

Does not cover: what has to run before the first step and how an attempt ends (`workers.run`), and sampling ahead
(`workers.pipeline`). Trainer and sampler work at the same time; a version is used only after its proof, and a step is
recorded only after its version is served.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.checkpoints import names
from app.core.states import RolloutState
from workers.batch import write_batch
from workers.budget import Budget
from workers.clock import Clock
from workers.diagnosis import JobTimes, StepTimes, spent, tool_facts
from workers.evaluation import Evaluations
from workers.messages import Progress, Step, StepDone
from workers.monitor import Callout, Monitor, no_signal, top_error
from workers.pipeline import Pipeline
from workers.publication import Publication, Publisher
from workers.registry import Registry, StepRecord
from workers.rollouts import metrics
from workers.rollouts.batch import Selected, Verdict, select
from workers.rollouts.congestion import Congestion
from workers.rollouts.pool import Pool, StepRollouts
from workers.rollouts.recorder import Recorder
from workers.rollouts.stream import Consumed
from workers.rollouts.types import Group
from workers.sampler.policy import ServedPolicy
from workers.series import Thresholds
from workers.setup import Inputs, JobFailure
from workers.trainer_link import TrainerLink

EMPTY_STEPS_LIMIT = 3  # steps in a row without anything to learn from
OVERDUE_CHECK_S = 5.0
PHASE_OF = {
    "sampling": "sampling",
    "rendering": "sampling",
    "tools": "tools",
    "queue": "queue",
    "tool_queue": "queue",
    "grading": "grading",
}


@dataclass
class Standing:
    """Where the job stands: what a snapshot's cursor brings back."""

    step: int = 0
    version: int = 0
    empty_steps: int = 0  # in a row, up to now
    consumed: Consumed = field(default_factory=lambda: Consumed({}))
    snapshot: tuple[str, str] = ("", "")  # path, sha256

    def cursor(self) -> dict[str, Any]:
        return {**self.consumed.cursor(), "version": self.version, "empty_steps": self.empty_steps}


@dataclass(frozen=True)
class Parts:
    """What the steps work with; all of it belongs to the attempt."""

    inputs: Inputs
    standing: Standing
    pool: Pool
    congestion: Congestion
    pipeline: Pipeline
    trainer: TrainerLink
    policy: ServedPolicy
    publisher: Publisher
    recorder: Recorder
    registry: Registry
    budget: Budget
    evaluations: Evaluations
    final_name: str
    batches: Path


class Training:
    """One per attempt. `run` returns when every step is taken, recorded and evaluated."""

    def __init__(self, parts: Parts, history: Sequence[Mapping[str, Any]]) -> None:
        self._p = parts
        self._plan = parts.inputs.plan
        self._at = parts.standing
        thresholds = Thresholds(
            importance_range=self._plan.importance_range,
            max_staleness=max(1, self._plan.max_staleness),
            uses_tools=bool(parts.inputs.endpoints),
        )
        self._monitor = Monitor(history, thresholds)
        self._times = JobTimes.from_history(history)
        if any("diagnosis" in data for data in history):
            parts.recorder.live["diagnosis"] = self._times.diagnosis().as_dict()
        self._history = history
        self._doing = ""
        self._unresolved = False  # the latest version could not be told from the one before it
        self._began = time.monotonic()  # this step

    async def run(self) -> None:
        """Raises `JobFailure`, `TooManyFailures`, `TrainerDied`, `LeaseLost`, `BudgetSpent`, …"""
        parts = self._p
        parts.recorder.describe = self._describe
        parts.recorder.present = self._present
        parts.trainer.on_progress = self._on_progress
        overdue = asyncio.create_task(self._watch(), name="overdue")
        try:
            await self._resume_evaluation()
            parts.pipeline.advance(self._at.step, self._at.version)
            while self._at.step < self._plan.total_steps:
                await parts.budget.check()
                await self._step()
            self._doing = "waiting for the last validation"
            await self._evaluated(Clock(parts.recorder.seconds))
        finally:
            parts.recorder.describe, parts.recorder.present = lambda: None, dict
            overdue.cancel()
            await asyncio.gather(overdue, return_exceptions=True)
            await parts.pipeline.close()
            await parts.evaluations.close()

    # --- a step -----------------------------------------------------------------------------------------------------

    async def _step(self) -> None:
        parts, at = self._p, self._at
        step, clock = at.step + 1, Clock(parts.recorder.seconds)
        idle, self._began = parts.pool.idle_s, clock.began
        self._doing = "waiting for rollouts"
        with clock.phase("waiting", counts_as=""):
            rollouts = await parts.pipeline.next(step)
        spent_on = spent(member.trajectory for member in rollouts.members)
        self._share(clock.step["waiting"], spent_on)
        selected = select(rollouts.of(Verdict.TRAINABLE), self._plan.max_trained_rollouts)
        data = metrics.step_data(step, self._plan.total_steps, rollouts)
        data["rollouts"]["top_error"] = top_error(member.error for member in rollouts.members)
        await parts.recorder.flush()
        at.consumed.add(rollouts.positions)
        staleness = at.version - rollouts.version
        batch_file = parts.batches / f"{step}.safetensors"
        done = None
        if selected.rows:
            done = await self._update(step, selected, batch_file, clock)
            data |= await self._publish(done, staleness, clock)
        at.empty_steps = 0 if done else at.empty_steps + 1
        parts.pipeline.advance(step, at.version)
        self._doing = f"step {step}: waiting for the validation before it"
        await self._evaluated(clock)
        data |= self._timing(clock, rollouts, spent_on, parts.pool.idle_s - idle)
        await self._record(step, rollouts, selected, done, data)
        await asyncio.to_thread(batch_file.unlink, True)
        at.step = step
        await self._retire()
        await self._callouts(data)
        await self._note_empty(rollouts)
        if self._evaluates(step):
            self._evaluate(data)

    async def _update(self, step: int, selected: Selected, batch_file: Path, clock: Clock) -> StepDone:
        self._doing = f"step {step}: training on {len(selected.chosen)} rollouts"
        with clock.phase("training"):
            sha256 = await asyncio.to_thread(write_batch, batch_file, selected.rows)
            done = await self._p.trainer.step(Step(self._at.version + 1, str(batch_file), sha256))
        self._at.version += 1
        self._at.snapshot = (done.snapshot, done.snapshot_sha256)
        return done

    async def _publish(self, done: StepDone, staleness: int, clock: Clock) -> dict[str, Any]:
        version = self._at.version
        self._doing = f"publishing version {version}"
        with clock.phase("publication"):
            publication = await self._p.publisher.publish(done.adapter)
        facts = publication.as_dict()
        await self._announce(publication, facts)
        return {
            "policy": {**done.metrics, "version": version, "staleness_mean": staleness, "staleness_max": staleness},
            "publication": facts,
            "update_seconds": dict(done.seconds),
        }

    async def _record(
        self, step: int, rollouts: StepRollouts, selected: Selected, done: StepDone | None, data: dict[str, Any]
    ) -> None:
        at = self._at
        dropped = await self._p.registry.step_done(
            StepRecord(
                step=step,
                snapshot=at.snapshot[0],
                snapshot_sha256=at.snapshot[1],
                cursor=at.cursor(),
                trained_tokens=int(done.metrics.get("trained_tokens", 0)) if done else 0,
                settled=_settled(rollouts, selected),
                advantages=selected.advantages,
                events=[(metrics.message(data), data)],
            )
        )
        for path in filter(None, dropped):
            await asyncio.to_thread(shutil.rmtree, path, True)

    async def _retire(self) -> None:
        """Unload what nobody samples from any more."""
        used = {self._at.version, self._p.evaluations.version, *self._p.pipeline.versions()}
        for version in self._p.policy.versions():
            if version not in used:
                await self._p.policy.retire(version)

    # --- what people are told ---------------------------------------------------------------------------------------

    def _timing(
        self, clock: Clock, rollouts: StepRollouts, spent_on: Mapping[str, float], idle_s: float
    ) -> dict[str, Any]:
        phases = clock.step
        times = StepTimes(
            wall_s=time.monotonic() - clock.began,
            waiting_for_rollouts_s=phases["waiting"],
            training_s=phases.get("training", 0.0),
            publication_s=phases.get("publication", 0.0),
            evaluation_s=phases.get("evaluation", 0.0),
            rollouts_idle_s=idle_s,
            spent=spent_on,
        )
        diagnosis = self._times.add(
            times, tool_facts(record for member in rollouts.members for record in member.trajectory.tools)
        )
        self._p.recorder.live["diagnosis"] = self._times.diagnosis().as_dict()
        return {
            "timing": {
                "step": {
                    "sampling": times.waiting_for_rollouts_s,
                    "training": times.training_s,
                    "publication": times.publication_s,
                    "waiting_for_trainer": idle_s,
                    "full_iteration": times.wall_s,
                }
            },
            "diagnosis": diagnosis,
        }

    def _share(self, waiting_s: float, spent_on: Mapping[str, float]) -> None:
        """Split the wait for rollouts by what they spent their time on, so that the job's phases add up."""
        by_phase: dict[str, float] = {}
        for name, seconds in spent_on.items():
            by_phase[PHASE_OF[name]] = by_phase.get(PHASE_OF[name], 0.0) + seconds
        total = sum(by_phase.values()) or 1.0
        seconds_of = self._p.recorder.seconds
        for phase, value in by_phase.items():
            seconds_of[phase] = seconds_of.get(phase, 0.0) + waiting_s * value / total

    async def _callouts(self, data: Mapping[str, Any]) -> None:
        for callout in self._monitor.observe(data):
            await self._call_out(callout, int(data["step"]))

    async def _call_out(self, callout: Callout, step: int) -> None:
        message = f"{callout.message}. {callout.suggestion}"
        await self._p.recorder.event(message, level="warn", data={"rule": callout.rule, "step": step, **callout.data})

    async def _announce(self, publication: Publication, facts: dict[str, Any]) -> None:
        """What was not proved, once, and again when it was in between; samplers that do not serve the version."""
        recorder = self._p.recorder
        recorder.live["publication"] = facts
        if publication.unresolved and not self._unresolved:
            await recorder.event(f"Not resolvable: {publication.unresolved}", level="warn", data=facts)
        self._unresolved = publication.unresolved is not None
        for sampler, reason in publication.refused.items():
            message = f"Sampler {sampler} does not serve version {publication.version}: {reason}"
            await recorder.event(message, level="warn", data={"sampler": sampler, "version": publication.version})

    async def _watch(self) -> None:
        """Say when a step takes several times as long as the others did."""
        while True:
            await asyncio.sleep(OVERDUE_CHECK_S)
            if callout := self._monitor.overdue(time.monotonic() - self._began, self._describe()):
                await self._call_out(callout, self._at.step + 1)

    async def _note_empty(self, rollouts: StepRollouts) -> None:
        """A step without signal moves nothing; say why, and stop when it goes on like this from the start."""
        at = self._at
        if not at.empty_steps:
            return
        constant = rollouts.of(Verdict.NO_SIGNAL)
        rewards = sorted({round(group.graded[0].reward, 4) for group in constant})
        verdict = no_signal(rewards, groups=len(rollouts.groups), constant=len(constant))
        message = f"Step {at.step} had nothing to learn from ({verdict.kind}): {verdict.sentence}"
        await self._p.recorder.event(message, level="warn", data={"step": at.step, "rewards": rewards[:50]})
        if at.empty_steps >= EMPTY_STEPS_LIMIT and at.version == 0 and self._plan.on_no_signal == "stop":
            raise JobFailure(
                "no_signal",
                f"{at.empty_steps} steps in a row had nothing to learn from ({verdict.kind}): {verdict.sentence}",
            )

    def _describe(self) -> str:
        return "; ".join(filter(None, (self._doing, self._p.pool.describe())))

    def _present(self) -> dict[str, Any]:
        """How far sampling is ahead, and what bounds it, now."""
        congestion = self._p.congestion
        return {
            "overlap": {
                "max_staleness": self._plan.max_staleness,
                "version": self._at.version,
                "in_flight": congestion.in_flight,
                "limit": congestion.limit,
                "waiting_for": self._doing or None,
            },
            "congestion": congestion.describe(),
        }

    def _on_progress(self, progress: Progress) -> None:
        total = f" of {progress.total}" if progress.total else ""
        self._doing = f"step {self._at.step + 1}: {progress.phase} {progress.done}{total}"

    # --- validation -------------------------------------------------------------------------------------------------

    async def _evaluated(self, clock: Clock) -> None:
        """Wait for the pass that runs beside this step."""
        with clock.phase("evaluation"):
            data = await self._p.evaluations.settled()
        if data is not None:
            await self._callouts(data)

    def _evaluates(self, step: int) -> bool:
        return step == self._plan.total_steps or step % self._plan.eval_interval == 0

    async def _resume_evaluation(self) -> None:
        """The baseline, or the pass that the last attempt's end interrupted."""
        step = self._at.step
        of_step = [data for data in self._history if data["step"] == step]
        if step == 0 and not any("valid" in data for data in of_step):
            self._evaluate({"step": 0, "total_steps": self._plan.total_steps})
        elif step and self._evaluates(step) and not await self._p.registry.has_checkpoint(step):
            self._evaluate(of_step[-1])

    def _evaluate(self, data: Mapping[str, Any]) -> None:
        """Sampled after every interval; greedy too at the baseline and at the end. The last bears the final name."""
        step, total = self._at.step, self._plan.total_steps
        final = self._p.final_name
        checkpoint = None if step == 0 else final if step == total else names.at_step(final, step)
        self._p.evaluations.start(step, self._at.version, data, greedy=step in (0, total), checkpoint=checkpoint)


def _settled(rollouts: StepRollouts, selected: Selected) -> dict[RolloutState, list[str]]:
    def graded(groups: Sequence[Group]) -> list[str]:
        return [member.key.id for group in groups for member in group.graded]

    return {
        RolloutState.TRAINED: [ended.key.id for ended in selected.chosen],
        RolloutState.NOT_SELECTED: [ended.key.id for ended in selected.left_out],
        RolloutState.NO_SIGNAL: graded(rollouts.of(Verdict.NO_SIGNAL)),
        RolloutState.GROUP_DROPPED: graded(rollouts.of(Verdict.DROPPED)),
    }
