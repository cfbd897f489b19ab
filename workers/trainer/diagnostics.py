"""Per-step diagnostics over the trained tokens, summed over micro-batches and ranks.

Does not cover: rewards and anything else the supervisor knows better.

Metrics, all means over trained tokens unless said otherwise:
  entropy, ratio_mean, mismatch_kl (k3 of sampler against trainer), mismatch_mean (|difference|), mismatch_max
  mismatch_kl_depth_<i>, mismatch_mean_depth_<i>   the same for the i-th turn of a row; 8 stands for all from there on
  importance_p01, _p50, _p99, _max                 of the ratio trainer / sampler, before any mask
  masked_token_share, masked_sequence_share        kept out of the loss; of tokens, of rows
  clip_ratio_low, clip_ratio_high                  kept but beyond the loss's clip: no gradient (dapo), capped (cispo)
  kl_to_base                                       k3 of the policy against the base, when it is in the loss
  trained_tokens, raw_tokens, forwarded_tokens, micro_batches   counts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DEEPEST = 8
LARGEST = 20.0  # log-ratio
QUANTILES = {"importance_p01": 0.01, "importance_p50": 0.5, "importance_p99": 0.99}


@dataclass(frozen=True)
class Clip:
    """Where the loss's clip begins: below `low` at a negative advantage, above `high` at a positive. None: nowhere."""

    low: float | None
    high: float | None


@dataclass(frozen=True)
class TokenFacts:
    """Flat, one value per trained token of a micro-batch: trainer's and sampler's log-prob, entropy, the row's
    advantage, whether the loss counts it, the depth of its turn, and its k3 to the base (None: not in the loss)."""

    new: Tensor
    old: Tensor
    entropy: Tensor
    advantages: Tensor
    kept: Tensor
    depth: Tensor
    kl: Tensor | None


@dataclass
class Diagnostics:
    """Sums over the trained tokens of one optimizer step; `metrics()` divides."""

    clip: Clip
    raw_tokens: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    by_depth: NDArray[np.float64] = field(
        default_factory=lambda: np.zeros((DEEPEST + 1, 3))
    )  # tokens, k3, |difference|
    ratios: list[NDArray[np.float32]] = field(default_factory=list)
    tokens: int = 0
    kept: int = 0
    rows: int = 0
    masked_rows: int = 0
    max_abs_diff: float = 0.0
    forwarded_tokens: int = 0
    micro_batches: int = 0

    @torch.no_grad()
    def add(self, facts: TokenFacts, rows: int, masked_rows: int) -> None:
        """The mismatch is k3 = e^d − 1 − d with d = trainer − sampler, an estimate of KL(sampler ‖ trainer) on tokens
        drawn by the sampler (Schulman, "Approximating KL divergence"); non-negative for every token."""
        self.rows += rows
        self.masked_rows += masked_rows
        if not facts.new.numel():
            return
        diff = facts.new.float() - facts.old.float()
        self.max_abs_diff = max(self.max_abs_diff, diff.abs().max().item())
        diff = diff.clamp(-LARGEST, LARGEST)  # one infinite ratio would hide all others
        ratio, k3, advantages = diff.exp(), torch.expm1(diff) - diff, facts.advantages
        low = torch.zeros_like(facts.kept) if self.clip.low is None else (ratio < self.clip.low) & (advantages < 0)
        high = torch.zeros_like(facts.kept) if self.clip.high is None else (ratio > self.clip.high) & (advantages > 0)
        self.tokens += diff.numel()
        self.kept += int(facts.kept.sum())
        self.ratios.append(ratio.cpu().numpy())
        for name, values in {
            "entropy": facts.entropy,
            "mismatch_kl": k3,
            "mismatch_mean": diff.abs(),
            "ratio_mean": ratio,
            "clip_ratio_low": low & facts.kept,
            "clip_ratio_high": high & facts.kept,
            **({} if facts.kl is None else {"kl_to_base": facts.kl}),
        }.items():
            self.sums[name] = self.sums.get(name, 0.0) + values.double().sum().item()
        depth = facts.depth.clamp(max=DEEPEST).cpu().numpy()
        for column, weights in enumerate((torch.ones_like(diff), k3, diff.abs())):
            self.by_depth[:, column] += np.bincount(depth, weights.double().cpu().numpy(), DEEPEST + 1)

    def include(self, others: Sequence[Diagnostics]) -> None:
        """Add what other ranks saw of the same step."""
        for other in others:
            for name, value in other.sums.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.by_depth += other.by_depth
            self.ratios += other.ratios
            self.tokens += other.tokens
            self.kept += other.kept
            self.rows += other.rows
            self.masked_rows += other.masked_rows
            self.max_abs_diff = max(self.max_abs_diff, other.max_abs_diff)
            self.forwarded_tokens += other.forwarded_tokens
            self.micro_batches += other.micro_batches

    def metrics(self) -> dict[str, float]:
        """What the module's docstring lists."""
        ratios = np.concatenate(self.ratios) if self.ratios else np.ones(1, dtype=np.float32)
        quantiles = np.quantile(ratios, list(QUANTILES.values()))
        metrics = {name: total / max(1, self.tokens) for name, total in self.sums.items()}
        for depth, (tokens, k3, difference) in enumerate(self.by_depth):
            if tokens:
                metrics[f"mismatch_kl_depth_{depth}"] = k3 / tokens
                metrics[f"mismatch_mean_depth_{depth}"] = difference / tokens
        return {
            **{name: float(value) for name, value in metrics.items()},
            **{name: float(value) for name, value in zip(QUANTILES, quantiles, strict=True)},
            "importance_max": float(ratios.max()),
            "masked_token_share": 1 - self.kept / max(1, self.tokens),
            "masked_sequence_share": self.masked_rows / max(1, self.rows),
            "mismatch_max": self.max_abs_diff,
            "trained_tokens": float(self.tokens),
            "forwarded_tokens": float(self.forwarded_tokens),
            "raw_tokens": float(self.raw_tokens),
            "micro_batches": float(self.micro_batches),
        }
