"""A bf16 policy scored in fp32 without a second copy of it: each layer's weights are widened only while it runs.

Does not cover: training, whose forward stays in the compute type. For the canary: a trainer without rounding of its own
lets the proof resolve smaller steps (docs/decisions/008). Memory: one layer, or the head, in fp32 beside the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

NARROW = (torch.bfloat16, torch.float16)


@contextmanager
def widened(policy: Any) -> Iterator[None]:
    """Forward passes of `policy` inside compute in fp32. No gradients; not for weights that are split over ranks."""
    causal = policy.get_base_model()
    body = causal.base_model
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    stacks = [module for module in body.modules() if isinstance(module, nn.ModuleList)]
    layers = _outermost([layer for stack in stacks for layer in stack])
    inside = {child for layer in layers for child in layer.modules()}
    leaves = [m for m in body.modules() if m not in inside and m is not embedding and not list(m.children())]
    with ExitStack() as hooks:
        hooks.callback(embedding.register_forward_hook(_wide_output).remove)
        for part in [*layers, *leaves, head]:  # leaves: what stands beside the layers, such as the last norm
            kept: list[tuple[nn.Parameter, torch.Tensor]] = []
            hooks.callback(part.register_forward_pre_hook(_Widen(kept)).remove)
            hooks.callback(part.register_forward_hook(_Restore(kept), always_call=True).remove)
        yield


def _outermost(parts: list[nn.Module]) -> list[nn.Module]:
    """Without parts that lie inside another one: a stack within a layer (experts) is widened with the layer."""
    inner = {child for part in parts for child in part.modules() if child is not part}
    return [part for part in parts if part not in inner]


def _wide_output(module: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
    return output.float()


class _Widen:
    def __init__(self, kept: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
        self._kept = kept

    def __call__(self, module: nn.Module, given: Any) -> None:
        for parameter in module.parameters():
            if parameter.dtype in NARROW:
                self._kept.append((parameter, parameter.data))
                parameter.data = parameter.data.float()


class _Restore:
    def __init__(self, kept: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
        self._kept = kept

    def __call__(self, module: nn.Module, given: Any, output: Any) -> None:
        while self._kept:
            parameter, data = self._kept.pop()
            parameter.data = data
