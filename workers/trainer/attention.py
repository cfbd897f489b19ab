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
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from workers.trainer.packing import BatchedCall, TailCall, TreePlan

NAME = "hone_tree"
TAIL_BLOCK = 1024  # queries of a lone row attended at once behind a longer prefix


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
    """No mask of queries × keys may live until the backward pass: at 8,000 tokens it is 80 MB a layer and row."""
    own = slice(call.start, call.stop)
    if call.path is None:
        return _attend(q[own], k[own], v[own], scaling)
    k, v = k.index_select(0, call.path), v.index_select(0, call.path)
    tail = call.stop - call.start
    shared = len(call.path) - tail
    if shared <= tail:  # the causal kernel over the whole path costs less than a mask; what the prefix asks is dropped
        return _attend(q.index_select(0, call.path), k, v, scaling)[shared:]
    parts = []
    for start in range(0, tail, TAIL_BLOCK):
        stop = min(tail, start + TAIL_BLOCK)
        queries, keys, values = q[own][start:stop], k[: shared + stop], v[: shared + stop]
        parts.append(
            checkpoint(_attend_end, queries, keys, values, scaling, use_reentrant=False, preserve_rng_state=False)
        )
    return torch.cat(parts)


def _attend_end(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """The queries are the last of the keys."""
    mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
    return _attend(q, k, v, scaling, mask)


def _attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """[tokens, heads, D] each; causal without a mask."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _batched(q: Tensor, k: Tensor, v: Tensor, call: BatchedCall, scaling: float) -> Tensor:
    out: Tensor = _Batched.apply(q[call.start : call.stop], k, v, call, scaling)  # type: ignore[no-untyped-call]
    return out


class _Batched(torch.autograd.Function):
    """softmax(q kᵀ) v for all rows of a call, with explicit matrix products over each row's path.

    The kernels behind `scaled_dot_product_attention` on CPU cost about twice as much on such short rows in bf16, most
    of it backward. The common prefix is copied to every row: a copy of keys is small against the probabilities, which
    then never have to be split, joined or transposed. Key gradients are summed over rows in fp32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: BatchedCall, scaling: float) -> Tensor:
        heads, kv_heads = q.shape[1], k.shape[1]
        # [rows * Hkv, tail * group, D]: the heads of a group share their keys, so they are more queries of one matrix.
        queries = _to_rows(q.index_select(0, call.queries - call.start) * scaling, call.rows, kv_heads)
        keys, values = (_to_rows(x.index_select(0, call.keys.flatten()), call.rows, kv_heads) for x in (k, v))
        scores = torch.bmm(queries, keys.transpose(1, 2))
        blocked = call.blocked.repeat_interleave(heads // kv_heads, dim=1)[:, None]
        scores.view(call.rows, kv_heads, *scores.shape[1:])[..., call.common :].masked_fill_(blocked, float("-inf"))
        probs = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(queries, keys, values, probs)
        ctx.call, ctx.scaling, ctx.slots = call, scaling, k.shape[0]
        return _from_rows(torch.bmm(probs, values), call.rows, heads).index_select(0, call.unpad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        queries, keys, values, probs = ctx.saved_tensors
        call: BatchedCall = ctx.call
        heads, kv_heads = grads[0].shape[1], keys.shape[0] // call.rows
        grad = grads[0].index_select(0, call.queries - call.start).masked_fill_(call.padding[:, None, None], 0.0)
        grad = _to_rows(grad, call.rows, kv_heads)
        d_probs = torch.bmm(grad, values.transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_probs, probs, -1, probs.dtype)
        d_q = _from_rows(torch.bmm(d_scores, keys), call.rows, heads).index_select(0, call.unpad) * ctx.scaling
        d_k = _key_grad(torch.bmm(d_scores.transpose(1, 2), queries), call, ctx.slots)
        d_v = _key_grad(torch.bmm(probs.transpose(1, 2), grad), call, ctx.slots)
        return d_q, d_k, d_v, None, None


def _key_grad(grad: Tensor, call: BatchedCall, slots: int) -> Tensor:
    """Sum the gradients of keys or values back into their slots: [rows * Hkv, path, D] → [N, Hkv, D]."""
    grad = grad.view(call.rows, -1, *grad.shape[1:])
    total = torch.zeros(slots, grad.shape[1], grad.shape[3], dtype=torch.float32, device=grad.device)
    common, own = grad[:, :, : call.common], grad[:, :, call.common :]
    total.index_add_(0, call.keys[0, : call.common], common.sum(0, dtype=torch.float32).transpose(0, 1))
    total.index_add_(0, call.keys[:, call.common :].flatten(), own.transpose(1, 2).flatten(0, 1).float())
    return total.to(grad.dtype)


def _to_rows(tokens: Tensor, rows: int, kv_heads: int) -> Tensor:
    """[rows * L, H, D] → [rows * Hkv, L * H / Hkv, D], contiguous."""
    dim = tokens.shape[-1]
    split = tokens.view(rows, -1, kv_heads, tokens.shape[1] // kv_heads, dim)
    return split.permute(0, 2, 1, 3, 4).reshape(rows * kv_heads, -1, dim)


def _from_rows(matrices: Tensor, rows: int, heads: int) -> Tensor:
    """[rows * Hkv, L * H / Hkv, D] → [rows * L, H, D]."""
    kv_heads, dim = matrices.shape[0] // rows, matrices.shape[-1]
    split = matrices.view(rows, kv_heads, -1, heads // kv_heads, dim)
    return split.permute(0, 2, 1, 3, 4).reshape(-1, heads, dim)
