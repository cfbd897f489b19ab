"""The vocabulary head on trained positions only: log-prob of one target and entropy per position.

Does not cover: which positions are trained (`workers.trainer.packing`); heads that scale or cap their logits take TRL's
fused head on the padded path.

Full logits never exist: a chunk of positions at a time, log-sum-exp in fp32. The gradient of a log-prob with respect to
its hidden state is W[target] − Σ p·W, so it is computed while the chunk's probabilities are at hand and only scaled in
the backward pass: two products with W instead of the three of recomputation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LOGITS = 8_000_000  # positions × vocabulary per product: 16 MB in bf16
BLOCK_LOGITS = 400_000  # positions × vocabulary per softmax: fp32 stays in a core's cache


def token_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """hidden [M, d], weight [V, d] (frozen), targets [M] → fp32 log_probs [M] and entropy [M].

    The entropy has no gradient of its own and is NaN where `hidden` needs none (nobody reads it there).
    """
    log_probs, entropy = _Head.apply(hidden, weight, targets, temperature)  # type: ignore[no-untyped-call]
    return log_probs, entropy


def _softmax_in_place(scores: Tensor, targets: Tensor, temperature: float, log_probs: Tensor) -> Tensor:
    """Turn logits [m, V] into probabilities, in fp32 block by block; fill `log_probs`, return log-sum-exp [m]."""
    log_norm = torch.empty_like(log_probs)
    rows = max(1, BLOCK_LOGITS // scores.shape[1])
    for start in range(0, len(scores), rows):
        block = slice(start, start + rows)
        logits = scores[block].float()
        if temperature != 1.0:
            logits /= temperature
        probs = torch.softmax(logits, dim=-1)
        # From the largest probability, which cannot underflow; an improbable target's could.
        log_norm[block] = logits.amax(-1) - probs.amax(-1).log_()
        log_probs[block] = logits.gather(1, targets[block, None])[:, 0] - log_norm[block]
        scores[block] = probs
    return log_norm


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        needs_grad = ctx.needs_input_grad[0]
        log_probs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.full_like(log_probs, float("nan"))
        direction = torch.empty_like(hidden) if needs_grad else None
        size = max(1, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            scores = F.linear(hidden[chunk], weight)
            log_norm = _softmax_in_place(scores, targets[chunk], temperature, log_probs[chunk])
            if direction is not None:
                mean = scores @ weight  # Σ p·W; hidden · mean is Σ p·logit, so the entropy needs no other pass
                entropy[chunk] = log_norm - torch.linalg.vecdot(hidden[chunk].float(), mean.float()) / temperature
                direction[chunk] = weight[targets[chunk]] - mean
        if direction is not None:
            ctx.save_for_backward(direction)
            ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (direction,) = ctx.saved_tensors
        return direction * (grads[0] / ctx.temperature)[:, None].to(direction.dtype), None, None, None
