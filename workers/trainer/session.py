"""One trainer session: load, publish the first version, then step, publish, snapshot, answer – until told to stop.

Does not cover: the loss and the packing (`workers.trainer.grpo`), the process around it (`workers.trainer.__main__`).

Order of one step: receive `Step`, check the batch, update, publish version k, snapshot, `StepDone`. Batch k + 1 is not
asked for before that, so a strictly on-policy run needs no other lock.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from workers.batch import TrainingRow, read_batch
from workers.messages import Progress, ProtocolError, Published, Ready, Start, Step, StepDone, Stop
from workers.trainer import grpo, model, precise, publish, scoring, snapshot
from workers.trainer.importance import Limits
from workers.trainer.world import Channel, RanksDiverged, World


class Stopped(Exception):
    """`Stop` was received while waiting for a step."""


class Session(TrainerCallback):  # type: ignore[misc]  # untyped base
    """Runs as TRL's callback: `on_train_begin` publishes the first version, `on_step_end` everything after a step."""

    def __init__(
        self,
        start: Start,
        channel: Channel,
        clock: Callable[[], float] = time.monotonic,
        began: float | None = None,
        world: World | None = None,
    ) -> None:
        """`began` is when the process was started, on the same clock; `Ready` counts from there.

        Every rank of `world` runs a session over the same messages; only rank 0 writes to disk.
        """
        self._start, self._channel, self._clock = start, channel, clock
        self._world = world or World()
        self._began = clock() if began is None else began
        self._step_began = self._began
        self.step = 0

    def run(self) -> None:
        """Returns after `Stop`; raises whatever went wrong."""
        start = self._start
        torch.set_num_threads(max(1, start.threads // self._world.size))
        if start.gpu_memory_share is not None and torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(start.gpu_memory_share)
        self._channel.send(Progress("load", 1, 3))
        self._canary: list[list[int]] = json.loads(Path(start.canary).read_text())
        policy = model.load_policy(start.model_path, start.dtype, start.lora, start.seed)
        sharded = start.shard_base and self._world.size > 1
        if sharded:
            model.shard_base(policy, self._world)
        self._scores_canary = sharded or not self._world.rank  # a sharded forward pass needs every rank
        self._channel.send(Progress("load", 2, 3))
        optimizer, scheduler = grpo.make_optimizer(policy, start.learning_rate)
        self._state = snapshot.TrainerState(policy, optimizer, scheduler)
        self.step = snapshot.read_step(Path(start.snapshot)) if start.snapshot else 0
        remaining = start.total_steps - self.step
        with tempfile.TemporaryDirectory(prefix="trainer-") as scratch:
            self._trainer = grpo.PackedGRPO(
                policy,
                self._hyperparameters(max(1, remaining)),
                scratch,
                self._next_rows,
                lambda done, total: self._channel.send(Progress("update", done, total)),
                self,
                (optimizer, scheduler),
                self._world,
                start.gpu_memory_share,
                in_step=sharded,
            )
            try:
                if remaining > 0:
                    self._trainer.train()
                else:
                    self._begin()
                self._await_stop()
            except Stopped:
                return

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._start.snapshot and state.global_step == 0:
            snapshot.restore_generators(Path(self._start.snapshot))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        updated = self._clock()
        self._compare_ranks()
        scores, canary_s = self._score_canary()
        if self._world.rank:
            return
        publication_began = self._clock()
        adapter = self._publish(scores)
        snapshot_began = self._clock()
        path, digest = snapshot.write_snapshot(Path(self._start.snapshots_dir), self.step, self._state)
        trainer = self._trainer
        metrics = {
            **trainer.diagnostics.metrics(),
            "loss": trainer.step_loss,
            "grad_norm": trainer.grad_norm,
            "learning_rate": float(self._state.optimizer.param_groups[0]["lr"]),
        }
        seconds = {
            "update": updated - self._step_began,
            "canary": canary_s,
            "publication": snapshot_began - publication_began,
            "snapshot": self._clock() - snapshot_began,
        }
        self._channel.send(StepDone(self.step, adapter, str(path), digest, metrics, seconds))

    def _begin(self) -> None:
        if self._start.snapshot:
            snapshot.restore_snapshot(Path(self._start.snapshot), self._state)
        scores, _ = self._score_canary()
        if self._world.rank:
            return
        adapter = self._publish(scores)
        self._channel.send(Ready(self.step, adapter, self._clock() - self._began))

    def _next_rows(self) -> Sequence[TrainingRow]:
        message = self._channel.receive()
        if isinstance(message, Stop):
            raise Stopped
        if not isinstance(message, Step) or message.step != self.step + 1:
            raise ProtocolError(f"expected step {self.step + 1}, got {message}")
        self._step_began = self._clock()
        rows = read_batch(Path(message.batch), message.sha256)
        self.step = message.step
        return rows

    def _await_stop(self) -> None:
        message = self._channel.receive()
        if not isinstance(message, Stop):
            raise ProtocolError(f"all {self._start.total_steps} steps are done; got {message}")

    def _score_canary(self) -> tuple[list[list[float]], float]:
        """The canary's log-probs with the adapter as it is now, in fp32 where one rank has the base; and how long."""
        if not self._scores_canary:
            return [], 0.0
        began = self._clock()
        self._channel.send(Progress("canary", 0, 1))
        with nullcontext() if self._start.shard_base else precise.widened(self._state.policy):
            scores = scoring.score_rows(self._state.policy, self._canary, self._start.temperature)
        return scores, self._clock() - began

    def _publish(self, canary: list[list[float]]) -> Published:
        start = self._start
        self._channel.send(Progress("publication", 0, 1))
        return publish.publish(
            self._state.policy,
            adapters_dir=Path(start.adapters_dir),
            prefix=start.adapter_prefix,
            version=self.step,
            lora=start.lora,
            base=start.model_path,
            canary=canary,
        )

    def _hyperparameters(self, steps: int) -> grpo.Hyperparameters:
        start = self._start
        return grpo.Hyperparameters(
            steps=steps,
            learning_rate=start.learning_rate,
            loss_type=start.loss_type,
            temperature=start.temperature,
            epsilon=start.epsilon,
            max_grad_norm=start.max_grad_norm,
            seed=start.seed,
            beta=start.beta,
            limits=Limits(start.importance_range, start.max_sequence_tv),
        )

    def _compare_ranks(self) -> None:
        """All ranks applied the same gradient to the same weights, so they hold the same bits."""
        sums = torch.stack([p.detach().double().sum() for p in self._state.trained().values()])
        if len(set(self._world.gather(sums.cpu().numpy().tobytes()))) > 1:
            raise RanksDiverged(f"after step {self.step} the ranks' adapters differ")
