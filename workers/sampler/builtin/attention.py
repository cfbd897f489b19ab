"""One decode step's attention: many sequences of different lengths, flattened to one row of tokens.

Registered with transformers under `NAME`; the engine sets a `StepPlan` for the thread, calls the model, and every layer
comes here. A prefix that several sequences share is attended once for all of them in one matrix product, each
sequence's own tail in a padded batch.
Does not cover: which tokens are shared and where they lie (`kv`, `lane`), nor sliding-window or soft-capped attention
(`model` refuses those).
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.sampler.builtin.kv import Segment

NAME = "hone_ragged"
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the only CPU kernel that returns its log-sum-exp


@dataclass(frozen=True)
class SharedPrefix:
    """Rows `rows` of a block (all when None) attend to the whole of a segment: it lies before all of their tokens."""

    segment: Segment
    rows: Tensor | None


@dataclass(frozen=True)
class DecodeBlock:
    """Flat tokens `start` to `stop`: sequences with one token each, whose tails are padded to a common length.

    Scores stand in one row of `width` shared positions and then the tail, so that one softmax covers both. On CPU this
    costs under half of the flash kernel, whose work per query is too small to pay for its set-up.
    """

    start: int
    stop: int
    slots: Tensor | slice
    mask: Tensor  # [rows, 1, 1, length] float32: 0 or -inf
    width: int
    prefixes: Sequence[SharedPrefix]
    ragged: bool  # some row attends to fewer than `width` shared positions


@dataclass(frozen=True)
class Chunk:
    """Flat tokens `start` to `stop` are a prefill chunk of the sequence in `slot`."""

    start: int
    stop: int
    slot: int
    mask: Tensor  # [1, 1, groups * chunk, length of the tail]
    prefixes: Sequence[Segment]


@dataclass(frozen=True)
class StepPlan:
    keys: Tensor  # [layers, slots, kv_heads, capacity, head_dim]
    values: Tensor
    tokens: int  # flat tokens that count; a row may be longer, and what stands behind them is computed for nothing
    write_index: Tensor  # [kv_heads * tokens] into slots * kv_heads * capacity
    blocks: Sequence[DecodeBlock]
    chunks: Sequence[Chunk]


_state = threading.local()


@contextmanager
def step(plan: StepPlan) -> Iterator[None]:
    _state.plan = plan
    try:
        yield
    finally:
        _state.plan = None


def chunk_mask(chunk: int, length: int, groups: int, dtype: torch.dtype) -> Tensor:
    """Causal mask of a chunk that ends at tail position `length`, once per query head of a KV group."""
    query = torch.arange(length - chunk, length)[:, None]
    mask = torch.zeros(chunk, length, dtype=dtype).masked_fill_(torch.arange(length)[None] > query, float("-inf"))
    return mask.repeat(groups, 1)[None, None]


def tail_mask(lengths: Tensor) -> Tensor:
    hidden = torch.arange(int(lengths.max()))[None] >= lengths[:, None]
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None, None]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, tokens, dim], key and value [1, kv_heads, tokens, dim] → [1, tokens, heads, dim]."""
    plan: StepPlan = _state.plan
    layer = module.layer_idx
    _, heads, length, dim = query.shape
    tokens, kv = plan.tokens, key.shape[1]
    keys, values = plan.keys[layer], plan.values[layer]
    keys.view(-1, dim).index_copy_(0, plan.write_index, key[:, :, :tokens].reshape(-1, dim))
    values.view(-1, dim).index_copy_(0, plan.write_index, value[:, :, :tokens].reshape(-1, dim))
    q = query.reshape(kv, heads // kv, length, dim)
    out = query.new_empty(length, kv, heads // kv, dim)
    out[tokens:] = 0
    for block in plan.blocks:
        rows = q[:, :, block.start : block.stop]
        out[block.start : block.stop] = _decode(block, layer, rows, keys, values, scaling)
    for chunk in plan.chunks:
        rows = q[:, :, chunk.start : chunk.stop]
        out[chunk.start : chunk.stop] = _prefill(chunk, layer, rows, keys, values, scaling)
    return out.view(1, length, heads, dim), None


def _decode(block: DecodeBlock, layer: int, q: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """q [kv, groups, rows, dim] → [rows, kv, groups, dim]."""
    kv, groups, n, dim = q.shape
    width, length = block.width, block.mask.shape[-1]
    scores = torch.empty(n, kv, groups, width + length)
    if block.ragged:
        scores[..., :width] = float("-inf")
    for prefix in block.prefixes:
        s = prefix.segment
        chosen = q if prefix.rows is None else q.index_select(2, prefix.rows)
        product = torch.bmm(chosen.reshape(kv, -1, dim), s.keys[layer].transpose(1, 2))
        place = product.view(kv, groups, -1, s.stop - s.start).permute(2, 0, 1, 3)
        if prefix.rows is None:
            torch.mul(place, scaling, out=scores[..., s.start : s.stop])
        else:
            scores[prefix.rows, :, :, s.start : s.stop] = place.float() * scaling  # assignment does not promote
    # A contiguous copy of the keys first: bmm on the strided slots is 2.5 x slower than both together.
    tail_keys = keys[block.slots, :, :length].contiguous().view(n * kv, length, dim)
    by_row = q.permute(2, 0, 1, 3).reshape(n * kv, groups, dim)
    product = torch.bmm(by_row, tail_keys.transpose(1, 2)).view(n, kv, groups, length)
    torch.add(block.mask, product, alpha=scaling, out=scores[..., width:])
    weights = scores.softmax(-1).to(q.dtype)
    tail_values = values[block.slots, :, :length]
    out = torch.matmul(weights[..., width:], tail_values)
    for prefix in block.prefixes:
        s = prefix.segment
        part = weights[..., s.start : s.stop]
        part = part if prefix.rows is None else part[prefix.rows]
        product = torch.bmm(part.permute(1, 2, 0, 3).reshape(kv, -1, s.stop - s.start), s.values[layer])
        shared = product.view(kv, groups, -1, dim).permute(2, 0, 1, 3)
        if prefix.rows is None:
            out = out + shared
        else:
            out.index_add_(0, prefix.rows, shared)
    return out


def _prefill(chunk: Chunk, layer: int, q: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """As `_decode` for the tokens of one sequence: flash attention over each part, merged by log-sum-exp (exact)."""
    kv, groups, n, dim = q.shape
    length = chunk.mask.shape[-1]
    rows = q.reshape(1, kv, groups * n, dim)
    tail = slice(chunk.slot, chunk.slot + 1)
    out, lse = _flash(rows, keys[tail, :, :length], values[tail, :, :length], attn_mask=chunk.mask, scale=scaling)
    for s in chunk.prefixes:
        more, more_lse = _flash(rows, s.keys[layer, None], s.values[layer, None], scale=scaling)
        out = torch.lerp(out.float(), more.float(), torch.sigmoid(more_lse - lse)[..., None]).to(q.dtype)
        lse = torch.logaddexp(lse, more_lse)
    return out.reshape(kv, groups, n, dim).permute(2, 0, 1, 3)  # type: ignore[no-any-return]
