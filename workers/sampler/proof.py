"""Proof that the served policy is the trained one: canary log-probs of the sampler against the trainer's.

Does not cover: telling version N from N-1 when the step is smaller than the precision resolves, which is a later gate;
what this gate sees is a wrong or broken adapter, the base served in its place, or a wrong scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FP32_LIMIT = 1e-3  # mean |difference|; seen correct: 1e-5, seen wrong: 0.1
BF16_LIMIT = 0.08  # seen correct: 0.031–0.056 over 256 tokens and more, seen wrong: 0.106–0.155


@dataclass(frozen=True)
class Match:
    """How near the sampler is to the trainer on the canary. `k3`: mean of exp(d) - 1 - d, d = sampler - trainer."""

    tokens: int
    mean_abs: float
    max_abs: float
    k3: float
    limit: float

    @property
    def holds(self) -> bool:
        return math.isfinite(self.mean_abs) and self.mean_abs <= self.limit

    def as_dict(self) -> dict[str, float | int | bool | None]:
        """For an event: JSON has no NaN, and neither has PostgreSQL's; such a figure is None."""
        return {
            "tokens": self.tokens,
            "mean_abs": _finite(self.mean_abs),
            "max_abs": _finite(self.max_abs),
            "k3": _finite(self.k3),
            "limit": self.limit,
            "holds": self.holds,
        }


def compare(served: Sequence[Sequence[float]], trained: Sequence[Sequence[float]], limit: float) -> Match:
    """Both per canary sequence, from position 1 on."""
    pairs = [
        (a, b)
        for served_row, trained_row in zip(served, trained, strict=True)
        for a, b in zip(served_row, trained_row, strict=True)
    ]
    differences = [a - b for a, b in pairs]
    return Match(
        tokens=len(pairs),
        mean_abs=math.fsum(abs(d) for d in differences) / len(pairs),
        max_abs=max(abs(d) for d in differences),
        k3=math.fsum(_k3(d) for d in differences) / len(pairs),
        limit=limit,
    )


def _finite(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None


def _k3(difference: float) -> float:
    try:
        return math.expm1(difference) - difference
    except OverflowError:  # another policy altogether: the figure must not hide that
        return math.inf


def limit_for(sampler_dtype: str, trainer_dtype: str, baseline: float | None) -> float:
    """fp32 on both sides is exact; otherwise the band is at least twice what v0 showed on this model and host."""
    if sampler_dtype == trainer_dtype == "float32":
        return FP32_LIMIT
    return max(BF16_LIMIT, 2 * (baseline or 0.0))
