"""A validation pass at one version, with the same tool loop as training; sampled always, greedy on request.

Does not cover: when passes are due (`workers.run`). Validation rollouts are never trained on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from workers.rollouts import metrics
from workers.rollouts.pool import Pool
from workers.rollouts.recorder import Recorder
from workers.rollouts.types import Ended, Row


class Validator:
    """One per run."""

    def __init__(self, pool: Pool, recorder: Recorder, rows: Sequence[Row], samples: int) -> None:
        self._pool = pool
        self._recorder = recorder
        self._rows = rows
        self._samples = samples

    async def run(self, step: int, version: int, so_far: dict[str, Any], *, greedy: bool) -> dict[str, Any]:
        """The metrics event of the pass: `so_far` (the step's training data) with the validation's numbers added."""
        began = time.monotonic()
        sampled = await self._pass("sampled", step, version)
        results = {
            "sampled": metrics.summary(sampled),
            "greedy": metrics.summary(await self._pass("greedy", step, version)) if greedy else None,
        }
        elapsed = time.monotonic() - began
        await self._recorder.flush()
        facts = results["sampled"] or {}
        timing = dict(so_far.get("timing", {}).get("step", {}))
        return {
            **so_far,
            "full_valid_mean_reward": facts["reward_mean"],
            "full_valid_mean_parse_error": facts["tool_error_rate"],
            "valid": results,
            "scores": {**so_far.get("scores", {}), "valid_reward_mean": facts["reward_mean"]},
            "valid_tools": metrics.tools(sampled, "valid"),
            "timing": {"step": {**timing, "eval": elapsed}},
        }

    async def _pass(self, name: str, step: int, version: int) -> list[Ended]:
        greedy = name == "greedy"
        samples = 1 if greedy else self._samples
        return await self._pool.evaluate(self._rows, step, version, samples=samples, greedy=greedy)
