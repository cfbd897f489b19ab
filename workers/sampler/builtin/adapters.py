"""Read a LoRA adapter in PEFT's format, refuse it unless it is exactly what its config says, and merge it.

The merge is W + scale * B A in fp32 from the weights as the model's files have them: one copy per version, never
unmerged.
Does not cover: names, slots and memory limits (`engine`).
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from workers.sampler.builtin.generation import AdapterRefused

_PREFIX = "base_model.model."
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # initialisations that also rewrite the base weights


@dataclass(frozen=True)
class AdapterConfig:
    rank: int
    scale: float
    targets: str | tuple[str, ...]

    def covers(self, module: str) -> bool:
        if isinstance(self.targets, str):
            return self.targets == "all-linear" or re.fullmatch(self.targets, module) is not None
        return any(module == t or module.endswith("." + t) for t in self.targets)


def merge_adapter(path: Path, pristine: Mapping[str, Tensor], *, max_rank: int) -> Iterator[tuple[str, Tensor]]:
    """Module names with their merged fp32 weights, one at a time: all of them at once are twice the served copy.

    Raises AdapterRefused before the first one is handed out.
    """
    config = read_config(path, max_rank)
    covered = [name for name in pristine if config.covers(name)]
    if not covered:
        raise AdapterRefused(f"target_modules {config.targets!r} name no linear layer of this model")
    tensors = _read_tensors(path)
    wanted = {f"{_PREFIX}{name}.lora_{x}.weight" for name in covered for x in "AB"}
    if missing := sorted(wanted - tensors.keys()):
        raise AdapterRefused(f"{len(missing)} of {len(wanted)} tensors are missing, the first is {missing[0]}")
    if surplus := sorted(tensors.keys() - wanted):
        raise AdapterRefused(f"{len(surplus)} tensors belong to no target module, the first is {surplus[0]}")
    pairs = {}
    for name in covered:
        out_features, in_features = pristine[name].shape
        a = _checked(tensors, f"{_PREFIX}{name}.lora_A.weight", (config.rank, in_features))
        pairs[name] = a, _checked(tensors, f"{_PREFIX}{name}.lora_B.weight", (out_features, config.rank))
    return ((n, torch.addmm(pristine[n].float(), b, a, alpha=config.scale)) for n, (a, b) in pairs.items())


def read_config(path: Path, max_rank: int) -> AdapterConfig:
    try:
        raw: Any = json.loads((path / "adapter_config.json").read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise AdapterRefused(f"adapter_config.json is not JSON: {error}") from error
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        raise AdapterRefused("adapter_config.json: peft_type must be LORA")
    for key in (
        "use_dora",
        "modules_to_save",
        "fan_in_fan_out",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layer_replication",
        "target_parameters",
        "exclude_modules",
        "lora_bias",
        "trainable_token_indices",
    ):
        if raw.get(key):
            raise AdapterRefused(f"adapter_config.json: {key} is not supported")
    if raw.get("bias", "none") != "none":
        raise AdapterRefused("adapter_config.json: bias must be none")
    if str(raw.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
        raise AdapterRefused(
            f"adapter_config.json: init_lora_weights {raw['init_lora_weights']!r} changes the base model"
        )
    rank, alpha, targets = raw.get("r"), raw.get("lora_alpha"), raw.get("target_modules")
    if not isinstance(rank, int) or not 1 <= rank <= max_rank:
        raise AdapterRefused(f"adapter_config.json: r is {rank!r}, allowed are 1 to {max_rank}")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterRefused(f"adapter_config.json: lora_alpha is {alpha!r}, not a number")
    if isinstance(targets, list) and all(isinstance(t, str) for t in targets):
        targets = tuple(targets)
    elif not isinstance(targets, str):
        raise AdapterRefused("adapter_config.json: target_modules must be a list of names or a pattern")
    scale = alpha / math.sqrt(rank) if raw.get("use_rslora") else alpha / rank
    return AdapterConfig(rank, scale, targets)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path / "adapter_model.safetensors")
    except SafetensorError as error:
        raise AdapterRefused(f"adapter_model.safetensors cannot be read: {error}") from error
    return tensors


def _checked(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    tensor = tensors[name]
    if tuple(tensor.shape) != shape:
        raise AdapterRefused(f"{name} has the shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
        raise AdapterRefused(f"{name} holds values that are not finite numbers")
    return tensor.float()
