"""Attention over a packed trie row: each tail sees its ancestors and, causally, itself.

Does not cover: which rows are attended together (`workers.trainer.packing`), models whose layers are not all full
attention (they take the padded path, see `workers.trainer.grpo`).

Registered with transformers under `NAME`; the plan reaches it as the keyword `tree` of the model's forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from workers.trainer.packing import BatchedCall, TailCall, TreePlan

NAME = "hone_tree"


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    tree: TreePlan | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, H, N, D], key and value [1, Hkv, N, D] → output [1, N, H, D], no weights."""
    if tree is None:
        raise RuntimeError(f"{type(module).__name__} did not hand the tree plan on to its attention")
    # Slot-major: a gather then copies whole tokens, all heads at once.
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    parts = [
        _batched(q, k, v, call, scaling) if isinstance(call, BatchedCall) else _tail(q, k, v, call, scaling)
        for call in tree.calls
    ]
    return torch.cat(parts)[None], None


def register() -> None:
    """Make `NAME` known to transformers. No mask function goes with it, so the model builds no mask."""
    AttentionInterface.register(NAME, tree_attention)


def _tail(q: Tensor, k: Tensor, v: Tensor, call: TailCall, scaling: float) -> Tensor:
    if call.path is None:
        k, v = k[call.start : call.stop], v[call.start : call.stop]
    else:
        k, v = k.index_select(0, call.path), v.index_select(0, call.path)
    q, k, v = (x.transpose(0, 1)[None] for x in (q[call.start : call.stop], k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=call.mask, is_causal=call.mask is None, scale=scaling, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _batched(q: Tensor, k: Tensor, v: Tensor, call: BatchedCall, scaling: float) -> Tensor:
    out: Tensor = _Batched.apply(q[call.start : call.stop], k, v, call, scaling)  # type: ignore[no-untyped-call]
    return out


class _Batched(torch.autograd.Function):
    """softmax(q [common | own]ᵀ) [common | own] for all rows of a call, with explicit matrix products.

    The kernels behind `scaled_dot_product_attention` on CPU cost 2–4 times as much on such short rows in bf16, most of
    all backward; and their key gradients would be summed over rows in bf16, here in fp32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: BatchedCall, scaling: float) -> Tensor:
        heads = q.shape[1]
        kv_heads = k.shape[1]
        # [Hkv, rows, tail * group, D]: the heads of a group share their keys, so they are more queries of one matrix.
        padded = _to_rows(q.index_select(0, call.queries - call.start) * scaling, call.rows, kv_heads)
        common_k, common_v = (x.index_select(0, call.common).transpose(0, 1).contiguous() for x in (k, v))
        own_k, own_v = (_to_rows(x.index_select(0, call.keys), call.rows, kv_heads) for x in (k, v))
        blocked = call.blocked.repeat_interleave(heads // kv_heads, dim=1)
        own = (padded @ own_k.transpose(-1, -2)).masked_fill_(blocked, float("-inf"))
        shared = (padded.flatten(1, 2) @ common_k.transpose(-1, -2)).view(*padded.shape[:-1], -1)
        probs = torch.softmax(torch.cat([shared, own], dim=-1), dim=-1)
        c = common_k.shape[1]
        out = probs[..., c:] @ own_v
        out += (probs[..., :c].flatten(1, 2) @ common_v).view_as(out)
        ctx.save_for_backward(padded, common_k, common_v, own_k, own_v, probs)
        ctx.call, ctx.scaling, ctx.slots = call, scaling, k.shape[0]
        return _from_rows(out, heads).index_select(0, call.unpad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        padded, common_k, common_v, own_k, own_v, probs = ctx.saved_tensors
        call: BatchedCall = ctx.call
        (grad,) = grads
        heads, kv_heads, c = grad.shape[1], common_k.shape[0], common_k.shape[1]
        grad = grad.index_select(0, call.queries - call.start).masked_fill_(call.padding[:, None, None], 0.0)
        grad = _to_rows(grad, call.rows, kv_heads)
        flat_grad, flat_q = grad.flatten(1, 2), padded.flatten(1, 2)
        d_probs = torch.cat(
            [(flat_grad @ common_v.transpose(-1, -2)).view(*grad.shape[:-1], -1), grad @ own_v.transpose(-1, -2)], -1
        )
        d_scores = torch._softmax_backward_data(d_probs, probs, -1, probs.dtype)
        d_common, d_own = d_scores[..., :c].flatten(1, 2), d_scores[..., c:]
        d_q = d_own @ own_k
        d_q += (d_common @ common_k).view_as(d_q)
        d_q = _from_rows(d_q, heads).index_select(0, call.unpad) * ctx.scaling
        d_k = _key_grad(ctx, d_common.transpose(-1, -2) @ flat_q, d_own.transpose(-1, -2) @ padded)
        p_common, p_own = probs[..., :c].flatten(1, 2), probs[..., c:]
        d_v = _key_grad(ctx, p_common.transpose(-1, -2) @ flat_grad, p_own.transpose(-1, -2) @ grad)
        return d_q, d_k, d_v, None, None


def _key_grad(ctx: Any, common: Tensor, own: Tensor) -> Tensor:
    """Sum key gradients back into slots, in fp32: common [Hkv, c, D] and own [Hkv, rows, K, D] → [N, Hkv, D]."""
    call: BatchedCall = ctx.call
    total = torch.zeros(ctx.slots, common.shape[0], common.shape[2], dtype=torch.float32, device=common.device)
    total.index_add_(0, call.keys, own.flatten(1, 2).transpose(0, 1).float())
    total.index_add_(0, call.common, common.transpose(0, 1).float())
    return total.to(common.dtype)


def _to_rows(tokens: Tensor, rows: int, kv_heads: int) -> Tensor:
    """[rows * L, H, D] → [Hkv, rows, L * H / Hkv, D], contiguous."""
    dim = tokens.shape[-1]
    split = tokens.reshape(rows, -1, kv_heads, tokens.shape[1] // kv_heads, dim)
    return split.permute(2, 0, 1, 3, 4).reshape(kv_heads, rows, -1, dim)


def _from_rows(rows: Tensor, heads: int) -> Tensor:
    """[Hkv, rows, L * H / Hkv, D] → [rows * L, H, D]."""
    kv_heads, count, _, dim = rows.shape
    split = rows.view(kv_heads, count, -1, heads // kv_heads, dim)
    return split.permute(1, 2, 0, 3, 4).reshape(-1, heads, dim)
