"""A validation pass and the checkpoint that follows it, beside the next step's sampling and training.

Does not cover: when passes are due (`workers.run`), and one pass's rollouts (`workers.validation`).

A pass pins one version and never trains. The record of the next step waits for it, so that a job that is resumed has
either the checkpoint of its last step or the version to make it from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.registry import Registry
from workers.rollouts import metrics
from workers.sampler.policy import ServedPolicy
from workers.storing import Checkpoints
from workers.validation import Validator

SHOWN = ("train_mean_reward", "full_valid_mean_reward", "completion_tokens_mean", "tool_calls_mean")


class Evaluations:
    """One per run; at most one pass is open.

    `facts` (job, base_model) stand in every manifest.
    """

    def __init__(
        self,
        validator: Validator,
        registry: Registry,
        policy: ServedPolicy,
        facts: Mapping[str, Any],
        checkpoints: Checkpoints,
    ) -> None:
        self._validator = validator
        self._registry = registry
        self._policy = policy
        self._facts = facts
        self._checkpoints = checkpoints
        self._open: tuple[int, asyncio.Task[dict[str, Any]]] | None = None

    def start(self, step: int, version: int, data: Mapping[str, Any], *, greedy: bool, checkpoint: str | None) -> None:
        """Validate `version`, adding to the step's metrics `data`; then publish it under the name `checkpoint`."""
        assert self._open is None
        work = self._evaluate(step, version, dict(data), greedy, checkpoint)
        self._open = version, asyncio.create_task(work, name=f"evaluate step {step}")

    @property
    def version(self) -> int | None:
        """The version that is being validated."""
        return self._open[0] if self._open else None

    async def settled(self) -> dict[str, Any] | None:
        """Wait for the open pass; its metrics, None when there is none. Raises what went wrong in it."""
        if self._open is None:
            return None
        data = await self._open[1]
        self._open = None
        return data

    async def close(self) -> None:
        if self._open is not None:
            self._open[1].cancel()
            await asyncio.gather(self._open[1], return_exceptions=True)

    async def _evaluate(
        self, step: int, version: int, data: dict[str, Any], greedy: bool, checkpoint: str | None
    ) -> dict[str, Any]:
        data = await self._validator.run(step, version, data, greedy=greedy)
        await self._registry.metrics(metrics.message(data), data)
        if checkpoint is not None:
            await self._publish(step, version, data, checkpoint)
        return data

    async def _publish(self, step: int, version: int, data: Mapping[str, Any], name: str) -> None:
        """A public, named checkpoint: files first, then the row."""
        facts = {**self._facts, "step": step, "version": version, "name": name}
        target, sha256 = await self._checkpoints.publish(Path(self._policy.path(version)), step, facts)
        shown = {"step": step, **{key: data.get(key) for key in SHOWN}}
        await self._registry.checkpoint(step, name, self._facts["base_model"], target, sha256, shown)
