"""Which trained tokens may teach: those on which trainer and sampler still agree.

Does not cover: the clip of the loss (TRL's). A masked token has no gradient and still counts in the loss's normaliser:
masking makes a step smaller and never makes the other tokens louder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """`token`: bounds of the probability ratio trainer / sampler. `sequence`: bound of a row's mean |ratio - 1| / 2, an
    estimate of the total variation between the two policies on that row. None: no bound."""

    token: tuple[float, float] | None = None
    sequence: float | None = None


NO_LIMITS = Limits()


@torch.no_grad()
def kept_tokens(new: Tensor, old: Tensor, trained: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """new, old, trained [rows, tokens] → bool [rows, tokens] of tokens that teach, bool [rows] of rows masked whole.

    `new` and `old` are the trainer's and the sampler's log-probs; a row's variation is measured over all its trained
    tokens, those beyond the token bounds included.
    """
    trained = trained.bool()
    ratio = torch.where(trained, new.float() - old.float(), 0.0).exp()
    kept = trained.clone()
    if limits.token is not None:
        low, high = limits.token
        kept &= (ratio >= low) & (ratio <= high)
    masked_rows = torch.zeros(len(new), dtype=torch.bool, device=new.device)
    if limits.sequence is not None:
        variation = (ratio - 1).abs().sum(1) / 2 / trained.sum(1).clamp(min=1)
        masked_rows = ~(variation <= limits.sequence)  # a ratio that is not finite is masked too
        kept &= ~masked_rows[:, None]
    return kept, masked_rows


def turn_depth(mask: Sequence[int]) -> list[int]:
    """For each token of a row the index of the turn it was sampled in: the runs of 1 in `mask`, from 0."""
    depth, turn, previous = [], -1, 0
    for value in mask:
        turn += bool(value and not previous)
        depth.append(max(turn, 0))
        previous = value
    return depth
