"""A transformers causal model made ready to serve: packed linear layers, our attention, one module per weight version.

General over models whose layers call the attention interface with rotary positions already applied; `load` proves that
with a short canary against the model's own attention and refuses the rest (sliding window, soft caps, state space).
Does not cover: reading adapters (`adapters`) or batching (`lane`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from workers.sampler.builtin import attention
from workers.sampler.builtin.kv import KVShape, SlotPool

PACK_ROWS = 64  # oneDNN lays a weight out for a batch of about this many rows: 1.4 x at 64 rows, still right for others


class ModelRefused(Exception):
    """The model in this directory cannot be served by the built-in engine."""


class PackedLinear(nn.Module):
    """A linear layer whose weight is stored in the layout oneDNN computes in, so that no call re-orders it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), PACK_ROWS)
        self.bias_values = bias
        self.shape = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias_values, "none", [], "")
        return y


@dataclass(frozen=True)
class ServedWeights:
    """One version: a module of its own that shares every tensor it did not change with the base."""

    module: Any
    bytes: int


class LoadedModel:
    """The base model. `pristine` keeps every adaptable weight as the files have it: merges always start there."""

    def __init__(self, path: Path, dtype: torch.dtype, max_length: int | None) -> None:
        config = AutoConfig.from_pretrained(path)
        text = config.get_text_config()
        context = int(getattr(text, "max_position_embeddings", 0) or 0)
        self.max_length = min(max_length or context, context) if context else (max_length or 2048)
        _refuse_unservable(text, self.max_length)
        ALL_ATTENTION_FUNCTIONS.register(attention.NAME, attention.attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(attention.NAME, _no_mask)
        module = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="eager").eval()
        module.requires_grad_(False)
        self.path, self.dtype = path, dtype
        self.vocabulary = int(text.vocab_size)
        heads = int(text.num_attention_heads)
        kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
        head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
        self.groups = heads // kv_heads
        self.shape = KVShape(int(text.num_hidden_layers), kv_heads, head_dim, dtype)
        self.eos = _eos(path, text)
        head = module.get_output_embeddings()
        self.pristine = {
            name: layer.weight.data
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and layer is not head
        }
        module.to(dtype)
        # Spread over the vocabulary: the first ids are control tokens, on which bf16 alone moves log-probs by 0.8.
        ids = (torch.arange(16) * 7919 + 4321)[None] % self.vocabulary
        expected = module(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        module.set_attn_implementation(attention.NAME)
        self._module = _twin(module)
        if packs(dtype):
            for name, layer in module.named_modules():
                if isinstance(layer, nn.Linear):
                    _replace(self._module, name, PackedLinear(layer.weight.data, _data(layer.bias)))
        self._prove(ids, expected)

    @property
    def base(self) -> ServedWeights:
        return ServedWeights(self._module, 0)

    def with_weights(self, merged: Iterable[tuple[str, Tensor]]) -> ServedWeights:
        """A version whose linear layers named in `merged` (pristine names, any dtype) have these weights."""
        module, size = _twin(self._module), 0
        for name, weight in merged:
            old = module.get_submodule(name)
            served = weight.to(self.dtype)
            size += served.nbytes
            if isinstance(old, PackedLinear):
                _replace(module, name, PackedLinear(served, old.bias_values))
            else:
                layer = nn.Linear(served.shape[1], served.shape[0], bias=False, device="meta")
                layer.weight = nn.Parameter(served, requires_grad=False)
                layer.bias = cast(nn.Linear, old).bias
                _replace(module, name, layer)
        return ServedWeights(module, size)

    def _prove(self, ids: Tensor, expected: Tensor) -> None:
        """The same 16 tokens, as a chunk and then one by one through our attention, must give the same log-probs."""
        pool = SlotPool(self.shape, slots=1, capacity=32)
        got, length = [], ids.shape[1]
        for start, stop in [(0, length // 2), *((i, i + 1) for i in range(length // 2, length))]:
            heads = torch.arange(self.shape.heads)[:, None] * pool.capacity
            mask = attention.chunk_mask(stop - start, stop, self.groups, self.dtype)
            plan = attention.StepPlan(
                pool.keys,
                pool.values,
                stop - start,
                (heads + torch.arange(start, stop)[None]).flatten(),
                [],
                [attention.Chunk(0, stop - start, 0, mask, ())],
            )
            with attention.step(plan):
                out = self._module(
                    input_ids=ids[:, start:stop], position_ids=torch.arange(start, stop)[None], use_cache=False
                )
            got.append(out.logits[0].float().log_softmax(-1))
        divergence = (expected.exp() * (expected - torch.cat(got))).sum(-1).median()
        # Median over positions, since one odd token is chaotic in bf16; seen 0.003 in bf16 and 1e-9 in fp32.
        if not float(divergence) <= (1e-4 if self.dtype == torch.float32 else 0.05):
            raise ModelRefused(
                f"the engine's distribution differs from the model's own by a KL of {divergence:.3g}: "
                "its attention is of a kind that the built-in engine does not compute. Serve it with vLLM."
            )


def packs(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def gemm_gflops(dtype: torch.dtype) -> float:
    """Best speed of a layer of a small model at 64 rows, which is what decides a decode step."""
    x, w = torch.randn(PACK_ROWS, 1024).to(dtype), torch.randn(2048, 1024).to(dtype)
    layer = PackedLinear(w, None) if packs(dtype) else None
    seconds = []
    for _ in range(30):
        begin = time.perf_counter()
        layer(x) if layer is not None else nn.functional.linear(x, w)
        seconds.append(time.perf_counter() - begin)
    return 2 * x.shape[0] * w.numel() / min(seconds) / 1e9  # the minimum: other processes only ever slow it down


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _data(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.data


def _refuse_unservable(config: Any, max_length: int) -> None:
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    windowed = "sliding_attention" in kinds or (not kinds and getattr(config, "use_sliding_window", window is not None))
    if window and windowed and window < max_length:
        raise ModelRefused(
            f"sliding-window attention of {window} tokens; start with --max-model-len {window} or use vLLM"
        )
    if kinds - {"full_attention", "sliding_attention"}:
        raise ModelRefused(f"layers of the kinds {sorted(kinds)} are not supported; use vLLM")
    if getattr(config, "attn_logit_softcapping", None):
        raise ModelRefused("soft-capped attention is not supported; use vLLM")


def _eos(path: Path, config: Any) -> frozenset[int]:
    ids: set[int] = set()
    sources = [config]
    if (path / "generation_config.json").exists():
        sources.append(GenerationConfig.from_pretrained(path))
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ids)


def _twin(module: nn.Module) -> nn.Module:
    """A module tree of its own over the same tensors; a replaced child of one is not seen by the other."""
    clone = module.__class__.__new__(module.__class__)
    clone.__dict__ = module.__dict__.copy()
    clone._parameters = dict(module._parameters)
    clone._buffers = dict(module._buffers)
    clone._modules = {n: _twin(c) if c is not None else None for n, c in module._modules.items()}
    return clone


def _replace(root: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, layer)
