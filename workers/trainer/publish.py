"""Publication of an adapter version: a PEFT directory that any engine loads, with the canary scores it was proved by.

Does not cover: loading it into a sampler, the comparison there and the deletion of old versions (the supervisor's).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor

from workers.messages import LoraSpec, Published
from workers.trainer.durable import write_directory

TENSOR_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
CANARY_FILE = "canary.json"


class BrokenAdapter(Exception):
    """The adapter in memory must not be published: tensors missing, surplus, misshapen or not finite."""


def adapter_tensors(policy: PeftModel) -> dict[str, Tensor]:
    """The adapter under PEFT's names, fp32, on the CPU."""
    state = get_peft_model_state_dict(policy)
    return {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in state.items()}


def check_adapter(tensors: Mapping[str, Tensor], policy: PeftModel, rank: int) -> None:
    """Every LoRA layer has its A [r, in] and B [out, r], nothing else is there, all is finite."""
    trainable = {
        name.replace(".default.weight", ".weight"): parameter.shape
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad
    }
    if different := set(trainable) ^ set(tensors):
        raise BrokenAdapter(f"tensors do not match the trained parameters: {sorted(different)[:4]}")
    for name, tensor in tensors.items():
        rank_axis = 0 if ".lora_A." in name else 1
        if tensor.shape != trainable[name] or tensor.shape[rank_axis] != rank:
            raise BrokenAdapter(f"{name} has shape {tuple(tensor.shape)}, rank {rank}")
        if not torch.isfinite(tensor).all():
            raise BrokenAdapter(f"{name} is not finite")


def publish(
    policy: PeftModel,
    *,
    adapters_dir: Path,
    prefix: str,
    version: int,
    lora: LoraSpec,
    base: str,
    canary: Sequence[Sequence[float]],
) -> Published:
    """Write `<adapters_dir>/<prefix>-v<version>/`. Raises `BrokenAdapter`, `AlreadyPublished`."""
    tensors = adapter_tensors(policy)
    check_adapter(tensors, policy, lora.rank)
    data = save(tensors, metadata={"format": "pt"})
    name = f"{prefix}-v{version}"
    final = adapters_dir / name
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    write_directory(
        final,
        {
            TENSOR_FILE: data,
            CONFIG_FILE: json.dumps(config, indent=1).encode(),
            CANARY_FILE: json.dumps([list(row) for row in canary]).encode(),
        },
    )
    return Published(version, name, str(final), hashlib.sha256(data).hexdigest(), str(final / CANARY_FILE))
