"""Make a version the served one, and prove it, before anything is sampled from it.

Does not cover: writing the adapter (the trainer), nor telling version N from N-1 below the noise of the precision.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from app.samplers.service import Adapter
from workers.messages import Published
from workers.sampler.policy import ServedPolicy
from workers.sampler.proof import Match, compare, limit_for
from workers.setup import JobFailure

log = logging.getLogger("hone.publication")


class Publisher:
    """One per run. `dtypes`: compute types of sampler and trainer, which decide what the proof can resolve."""

    def __init__(self, policy: ServedPolicy, canary: Sequence[Sequence[int]], dtypes: tuple[str, str]) -> None:
        self._policy = policy
        self._canary = canary
        self._dtypes = dtypes
        self._mismatch_of_v0: float | None = None

    async def publish(self, adapter: Published) -> Match:
        """Load into every live sampler, then compare its log-probs on the canary with the trainer's.

        Raises `JobFailure` (policy_mismatch) when they do not agree; version 0 must equal the base model as well.
        """
        await self._policy.publish(adapter.version, Adapter(adapter.name, adapter.path))
        trained = json.loads(await asyncio.to_thread(Path(adapter.canary_log_probs).read_text))
        served = await self._policy.score(adapter.name, self._canary)
        limit = limit_for(*self._dtypes, self._mismatch_of_v0)
        match = compare(served, trained, limit)
        if adapter.version == 0:
            base = compare(await self._policy.score(self._policy.base_model, self._canary), served, limit)
            _require(base, "version 0 (B = 0) does not equal the base model")
            self._mismatch_of_v0 = match.mean_abs
        _require(match, f"the sampler's version {adapter.version} is not the trainer's")
        log.info("published %s: %s", adapter.name, match.as_dict())
        return match


def _require(match: Match, otherwise: str) -> None:
    if not match.holds:
        figures = f"mean |difference| {match.mean_abs:.4g} over {match.tokens} tokens, limit {match.limit:.4g}"
        raise JobFailure("policy_mismatch", f"{otherwise}: {figures}", None, match.as_dict())
