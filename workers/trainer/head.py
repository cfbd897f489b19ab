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

CHUNK_LOGITS = 8_000_000  # positions × vocabulary per chunk: 32 MB in fp32


def token_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """hidden [M, d], weight [V, d] (frozen), targets [M] → fp32 log_probs [M] and entropy [M] (without gradient)."""
    log_probs, entropy = _Head.apply(hidden, weight, targets, temperature)  # type: ignore[no-untyped-call]
    return log_probs, entropy


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        needs_grad = ctx.needs_input_grad[0]
        log_probs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(log_probs)
        direction = torch.empty_like(hidden) if needs_grad else None
        size = max(1, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            logits = F.linear(hidden[chunk], weight).float()
            if temperature != 1.0:
                logits /= temperature
            log_all = torch.log_softmax(logits, dim=-1)
            log_probs[chunk] = log_all.gather(1, targets[chunk, None])[:, 0]
            probs = log_all.exp()
            entropy[chunk] = -torch.linalg.vecdot(probs, log_all)
            if direction is not None:
                direction[chunk] = weight[targets[chunk]] - probs.to(hidden.dtype) @ weight
        if direction is not None:
            ctx.save_for_backward(direction)
            ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (direction,) = ctx.saved_tensors
        return direction * (grads[0] / ctx.temperature)[:, None].to(direction.dtype), None, None, None
