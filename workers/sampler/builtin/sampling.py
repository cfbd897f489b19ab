"""From logits to one token and its raw log-probability per row.

The draw is an inverse CDF over blocks of the vocabulary: `torch.multinomial` took a fifth of a step at 49k tokens.
Does not cover: stopping rules (`lane`).
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.sampler.builtin.generation import Generation

GROUP = 64  # rows whose weights are in memory at once: 12 MB at 49k tokens, 39 MB at 152k


@dataclass(frozen=True)
class Draw:
    token: int
    log_prob: float  # not finite when the model's output was not


@dataclass(frozen=True)
class Row:
    params: Generation
    rng: random.Random
    seen: Sequence[int]  # prompt and completion so far, for the repetition penalty


class Sampler:
    """Holds the memory of one group of rows, since 12 MB from the system at every step cost more than the sampling."""

    def __init__(self) -> None:
        self._scratch = torch.empty(0)

    def draw(self, logits: Tensor, rows: Sequence[Row]) -> list[Draw]:
        """logits [rows, vocabulary] in any float dtype; row i is sampled as `rows[i]` asks."""
        draws: list[Draw] = []
        for at in range(0, len(rows), GROUP):
            draws += self._draw(logits[at : at + GROUP], rows[at : at + GROUP])
        return draws

    def score(self, logits: Tensor, targets: Tensor) -> list[tuple[float, int]]:
        """Log-probability and rank (1 is the most likely) of each target under its row of logits."""
        scores: list[tuple[float, int]] = []
        for at in range(0, len(targets), GROUP):
            x, wanted = logits[at : at + GROUP], targets[at : at + GROUP, None]
            peak = x.amax(-1).float()
            chosen = x.gather(1, wanted)
            log_probs = _log_probs(chosen, peak, self._weights(x, peak))
            ranks = (x > chosen).sum(-1) + 1
            scores += zip(log_probs.tolist(), ranks.tolist(), strict=True)
        return scores

    def _draw(self, x: Tensor, rows: Sequence[Row]) -> list[Draw]:
        peak = x.amax(-1).float()
        blocks = self._weights(x, peak)
        plain = [i for i, row in enumerate(rows) if row.params.plain]
        if len(plain) == len(rows):
            tokens = _invert(blocks, _uniforms(rows))
        else:
            tokens = torch.zeros(len(rows), dtype=torch.int64)
            if plain:
                tokens[plain] = _invert(blocks[plain], _uniforms([rows[i] for i in plain]))
            for i, row in enumerate(rows):
                if not row.params.plain:
                    tokens[i] = _draw_filtered(x[i].to(torch.float32, copy=True), row)
        tokens.clamp_(max=x.shape[-1] - 1)
        log_probs = _log_probs(x.gather(1, tokens[:, None]), peak, blocks)
        return [Draw(t, p) for t, p in zip(tokens.tolist(), log_probs.tolist(), strict=True)]

    def _weights(self, x: Tensor, peak: Tensor) -> Tensor:
        """exp(x - peak) in float32 as [rows, blocks, size], zero behind the vocabulary; valid until the next call."""
        rows, vocabulary = x.shape
        size = _block(vocabulary)
        padded = -(-vocabulary // size) * size
        if self._scratch.numel() < rows * padded:
            self._scratch = torch.zeros(rows * padded)
        scratch = self._scratch[: rows * padded].view(rows, padded)
        scratch[:, :vocabulary].copy_(x).sub_(peak[:, None]).exp_()
        scratch[:, vocabulary:] = 0.0
        return scratch.view(rows, -1, size)


def _log_probs(chosen: Tensor, peak: Tensor, blocks: Tensor) -> Tensor:
    """float64 log-softmax of the chosen logits [rows, 1]; the total is summed by blocks, so float32 weights suffice."""
    return chosen[:, 0].double() - peak.double() - blocks.sum(-1).double().sum(-1).log()


def _uniforms(rows: Sequence[Row]) -> Tensor:
    return torch.tensor([row.rng.random() for row in rows], dtype=torch.float64)


def _block(vocabulary: int) -> int:
    size = math.gcd(vocabulary, 512)
    return size if size >= 32 else 256


def _invert(blocks: Tensor, uniforms: Tensor) -> Tensor:
    rows, _, size = blocks.shape
    outer = blocks.sum(-1).double().cumsum(-1)
    goal = uniforms[:, None] * outer[:, -1:]
    block = torch.searchsorted(outer, goal, right=True).clamp_(max=blocks.shape[1] - 1)
    below = outer.gather(1, (block - 1).clamp_(min=0)).masked_fill_(block == 0, 0.0)
    inner = blocks[torch.arange(rows), block[:, 0]].double().cumsum(-1)
    # Rounding may leave the goal a hair beyond the block: take the last token that has weight, never one without.
    rest = torch.minimum(goal - below, torch.nextafter(inner[:, -1:], torch.zeros(())).to(inner.dtype))
    return block[:, 0] * size + torch.searchsorted(inner, rest, right=True)[:, 0].clamp_(max=size - 1)


def _draw_filtered(x: Tensor, row: Row) -> Tensor:
    """One row with temperature, filters or a penalty; x [vocabulary] float32 is overwritten."""
    p = row.params
    if p.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(row.seen)))
        x[seen] = torch.where(x[seen] > 0, x[seen] / p.repetition_penalty, x[seen] * p.repetition_penalty)
    if p.temperature == 0.0:
        return x.argmax()
    x /= p.temperature
    if p.min_p > 0.0:
        x[x < x.max() + math.log(p.min_p)] = -torch.inf
    if 0 < p.top_k < len(x):
        x[x < x.topk(p.top_k).values[-1]] = -torch.inf
    if p.top_p < 1.0:
        ordered, order = x.sort(descending=True)
        probs = ordered.softmax(-1)
        x[order[probs.cumsum(-1) - probs >= p.top_p]] = -torch.inf  # the first token to cross the line stays
    size = _block(len(x))
    weights = F.pad((x - x.max()).exp_(), (0, -len(x) % size))
    return _invert(weights.view(1, -1, size), _uniforms([row]))[0]
