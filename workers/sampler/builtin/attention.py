"""One decode step's attention: many sequences of different lengths, flattened to one row of tokens.

Registered with transformers under `NAME`; the engine sets a `StepPlan` for the thread, calls the model, and every layer
comes here. A prefix that several sequences share is attended once for all of them (a `SegmentCall`), each sequence's own
tail in a padded batch (`TailCall`), and the parts are merged through their log-sum-exps, which is exact.
Does not cover: which tokens are shared and where they lie (`kv`), nor sliding-window or soft-capped attention
(`model.load` refuses those).
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAME = "hone_ragged"
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the only CPU kernel that returns its log-sum-exp


@dataclass(frozen=True)
class SegmentCall:
    """Tokens `index` (all when None) attend to the whole of a shared segment; no mask: it lies before all of them."""

    keys: Tensor  # [layers, length, kv_heads, head_dim]
    values: Tensor
    index: Tensor | None


@dataclass(frozen=True)
class TailCall:
    """Slots `low` to `high` with one query token each attend to their own first `mask.shape[-1]` positions."""

    low: int
    high: int
    mask: Tensor  # [rows, 1, 1, length], 0 or -inf, in the model's dtype


@dataclass(frozen=True)
class ChunkCall:
    """Flat tokens `start` to `stop` are a prefill chunk of the sequence in `slot`."""

    slot: int
    start: int
    stop: int
    length: int  # tail positions visible to the last token
    mask: Tensor  # [1, 1, groups * chunk, length]


@dataclass(frozen=True)
class StepPlan:
    """Flat order: the single-token rows (by slot) first, then the chunks."""

    keys: Tensor  # [layers, slots, capacity, kv_heads, head_dim]
    values: Tensor
    write_index: Tensor  # [tokens] into slots * capacity
    singles: int
    single_slots: Tensor | None  # slot of each single row; None when row i is slot i
    tails: Sequence[TailCall]
    chunks: Sequence[ChunkCall]
    segments: Sequence[SegmentCall]


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


def tail_mask(lengths: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
    hidden = torch.arange(longest)[None] >= lengths[:, None]
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[:, None, None]


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """query [1, heads, tokens, dim], key and value [1, kv_heads, tokens, dim] → [1, tokens, heads, dim]."""
    plan: StepPlan = _state.plan
    layer = module.layer_idx
    _, heads, tokens, dim = query.shape
    kv = key.shape[1]
    groups = heads // kv
    keys, values = plan.keys[layer], plan.values[layer]
    keys.view(-1, kv, dim).index_copy_(0, plan.write_index, key[0].transpose(0, 1))
    values.view(-1, kv, dim).index_copy_(0, plan.write_index, value[0].transpose(0, 1))
    q = query.reshape(kv, groups, tokens, dim)

    if len(plan.tails) == 1 and not plan.chunks and plan.single_slots is None:
        out, lse = _tail(plan.tails[0], q.permute(2, 0, 1, 3), keys, values, scaling)
    else:
        out = query.new_empty(tokens, kv, groups, dim)
        lse = torch.empty(tokens, kv, groups, dtype=torch.float32)
        if plan.singles:
            _singles(plan, q[:, :, : plan.singles].permute(2, 0, 1, 3), keys, values, scaling, out, lse)
        for c in plan.chunks:
            size = c.stop - c.start
            o, s, *_rest = _flash(
                q[:, :, c.start : c.stop].reshape(1, kv, groups * size, dim),
                keys[c.slot, None, : c.length].transpose(1, 2),
                values[c.slot, None, : c.length].transpose(1, 2),
                attn_mask=c.mask,
                scale=scaling,
            )
            out[c.start : c.stop] = o.view(kv, groups, size, dim).permute(2, 0, 1, 3)
            lse[c.start : c.stop] = s.view(kv, groups, size).permute(2, 0, 1)

    for segment in plan.segments:
        out, lse = _merge_segment(segment, layer, q, out, lse, scaling)
    return out.to(query.dtype).reshape(1, tokens, heads, dim), None


def _tail(call: TailCall, rows: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    length = call.mask.shape[-1]
    out, lse = _flash(
        rows,
        keys[call.low : call.high, :length].transpose(1, 2),
        values[call.low : call.high, :length].transpose(1, 2),
        attn_mask=call.mask,
        scale=scaling,
    )
    return out, lse


def _singles(
    plan: StepPlan, rows: Tensor, keys: Tensor, values: Tensor, scaling: float, out: Tensor, lse: Tensor
) -> None:
    if plan.single_slots is None:
        for call in plan.tails:
            out[call.low : call.high], lse[call.low : call.high] = _tail(
                call, rows[call.low : call.high], keys, values, scaling
            )
        return
    slots = plan.tails[-1].high
    spread = rows.new_zeros(slots, *rows.shape[1:]).index_copy_(0, plan.single_slots, rows)
    all_out, all_lse = spread.new_empty(spread.shape), torch.empty(spread.shape[:3], dtype=torch.float32)
    for call in plan.tails:
        all_out[call.low : call.high], all_lse[call.low : call.high] = _tail(
            call, spread[call.low : call.high], keys, values, scaling
        )
    out[: plan.singles] = all_out[plan.single_slots]
    lse[: plan.singles] = all_lse[plan.single_slots]


def _merge_segment(
    segment: SegmentCall, layer: int, q: Tensor, out: Tensor, lse: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """softmax over A ∪ B = the two softmaxes weighted by sigmoid of the difference of their log-sum-exps."""
    chosen = q if segment.index is None else q.index_select(2, segment.index)
    kv, groups, count, dim = chosen.shape
    o, s = _flash(
        chosen.reshape(1, kv, groups * count, dim),
        segment.keys[layer, None].transpose(1, 2),
        segment.values[layer, None].transpose(1, 2),
        scale=scaling,
    )
    o = o.view(kv, groups, count, dim).permute(2, 0, 1, 3).float()
    s = s.view(kv, groups, count).permute(2, 0, 1)
    if segment.index is None:
        merged = torch.lerp(out.float(), o, torch.sigmoid(s - lse)[..., None])
        return merged, torch.logaddexp(s, lse)
    before, before_lse = out[segment.index].float(), lse[segment.index]
    merged = torch.lerp(before, o, torch.sigmoid(s - before_lse)[..., None])
    out = out.float()
    out[segment.index] = merged
    lse[segment.index] = torch.logaddexp(s, before_lse)
    return out, lse
