"""LoRA layers and RMS norms with short, exact backward passes for a frozen base.

Does not cover: PEFT variants other than plain LoRA without dropout, which keep PEFT's own forward.

PEFT casts activations to fp32 for fp32 adapters and adds two full-size elementwise passes per layer; autocast casts
again at every call. Here the small adapter factors are cast to the compute dtype, the fp32 master weights receive the
gradient, and the base weight gets none.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

ADAPTER = "default"

# Norms with exactly `weight * (x / rms(x)).to(dtype)`, the mean in fp32. Others (e.g. 1 + weight) are left alone.
PLAIN_RMS_NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})


def speed_up(model: PeftModel) -> None:
    """Replace the forward of every plain LoRA linear and every plain RMS norm of `model`, in place."""
    for module in model.modules():
        if isinstance(module, LoraLinear) and _is_plain(module):
            module.forward = MethodType(_lora_forward, module)
        elif type(module).__name__ in PLAIN_RMS_NORMS and not module.weight.requires_grad:
            module.forward = MethodType(_norm_forward, module)


def _is_plain(module: Any) -> bool:
    return (
        list(module.lora_A) == [ADAPTER]
        and type(module.base_layer) is nn.Linear
        and isinstance(module.lora_dropout[ADAPTER], nn.Identity)
        and not module.lora_variant
        and module.lora_B[ADAPTER].bias is None
    )


def _lora_forward(self: Any, x: Tensor) -> Tensor:
    base = self.base_layer
    if self.disable_adapters or self.merged:
        result: Tensor = base(x)
        return result
    a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
    flat: Tensor = _Lora.apply(  # type: ignore[no-untyped-call]
        x.flatten(0, -2), base.weight, base.bias, a, b, self.scaling[ADAPTER]
    )
    return flat.view(*x.shape[:-1], -1)


def _norm_forward(self: Any, x: Tensor) -> Tensor:
    result: Tensor = _RmsNorm.apply(x, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
    return result


class _Lora(torch.autograd.Function):
    """y = x Wᵀ + bias + s (x Aᵀ) Bᵀ with W frozen; x [n, in], A [r, in], B [out, r]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float) -> Tensor:
        a_low, b_low = a.to(x.dtype), (b * s).to(x.dtype)
        down = x @ a_low.t()
        ctx.save_for_backward(x, weight, a_low, b_low, down)
        ctx.scale = s
        return F.linear(x, weight, bias).addmm_(down, b_low.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, weight, a_low, b_low, down = ctx.saved_tensors
        (grad,) = grads
        up = grad @ b_low
        d_x = (grad @ weight).addmm_(up, a_low) if ctx.needs_input_grad[0] else None
        d_a = (up.t() @ x).float()
        d_b = (grad.t() @ down).float().mul_(ctx.scale)
        return d_x, None, None, d_a, d_b, None


class _RmsNorm(torch.autograd.Function):
    """y = weight * (x r).to(dtype), r = (mean x² + eps)^-½; the weight is frozen. Keeps only x and r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rms)
        normed: Tensor = (wide * rms).to(x.dtype).mul_(weight)
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, rms = ctx.saved_tensors
        g = (grads[0] * weight).float()
        wide = x.float()
        dot = torch.linalg.vecdot(g, wide)[..., None].mul_(rms.square()).div_(x.shape[-1])
        return (g.sub_(wide.mul_(dot))).mul_(rms).to(x.dtype), None, None
