"""Per-step diagnostics over the trained tokens, summed over micro-batches.

Does not cover: rewards and anything else the supervisor knows better.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Diagnostics:
    """Sums over the trained tokens of one optimizer step; `metrics()` divides."""

    epsilon: float
    sums: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    max_abs_diff: float = 0.0
    raw_tokens: int = 0
    forwarded_tokens: int = 0
    micro_batches: int = 0

    @torch.no_grad()
    def add(self, new: Tensor, old: Tensor, entropy: Tensor, advantages: Tensor) -> None:
        """All flat, one value per trained token: trainer's and sampler's log-prob, entropy, the row's advantage.

        The mismatch is k3 = e^d − 1 − d with d = trainer − sampler, an estimate of KL(sampler ‖ trainer) on tokens
        drawn by the sampler (Schulman, "Approximating KL divergence"); non-negative for every token.
        """
        self.micro_batches += 1
        if not new.numel():
            return
        diff = new.float() - old.float()
        ratio = diff.exp()
        self.tokens += new.numel()
        self.max_abs_diff = max(self.max_abs_diff, diff.abs().max().item())
        for name, values in {
            "entropy": entropy,
            "mismatch_kl": torch.expm1(diff) - diff,
            "mismatch_mean": diff.abs(),
            "ratio_mean": ratio,
            "clip_ratio_low": (ratio < 1 - self.epsilon) & (advantages < 0),
            "clip_ratio_high": (ratio > 1 + self.epsilon) & (advantages > 0),
        }.items():
            self.sums[name] = self.sums.get(name, 0.0) + values.double().sum().item()

    def metrics(self) -> dict[str, float]:
        """Means per trained token and the token counts."""
        means = {name: total / max(1, self.tokens) for name, total in self.sums.items()}
        return {
            **means,
            "mismatch_max": self.max_abs_diff,
            "trained_tokens": float(self.tokens),
            "forwarded_tokens": float(self.forwarded_tokens),
            "raw_tokens": float(self.raw_tokens),
            "micro_batches": float(self.micro_batches),
        }
