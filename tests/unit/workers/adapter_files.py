"""Adapter directories and the base model's header, as a trainer writes them, without torch; for tests that break them.

Does not cover: weights that mean anything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from workers.messages import LoraSpec
from workers.sampler.proof.files import AdapterFiles

Tensors = dict[str, NDArray[Any]]
LAYERS, WIDTH, RANK = 2, 6, 2
TARGETS = ("q_proj", "o_proj")
SPEC = LoraSpec(RANK, 4, TARGETS)


def write_base(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    square = np.zeros((WIDTH, WIDTH), np.float32)
    base = {f"model.layers.{layer}.attn.{target}.weight": square for layer in range(LAYERS) for target in TARGETS}
    base["model.embed.weight"] = np.zeros((9, WIDTH), np.float32)
    (directory / "model.safetensors").write_bytes(save(base))
    return directory


def expected(model: Path) -> AdapterFiles:
    return AdapterFiles(model=model, rank=RANK, alpha=4, targets=TARGETS)


def tensors(spec: LoraSpec = SPEC, fill: float = 0.1) -> Tensors:
    found: Tensors = {}
    for layer in range(LAYERS):
        for target in spec.targets:
            key = f"base_model.model.model.layers.{layer}.attn.{target}.lora"
            found[f"{key}_A.weight"] = np.full((spec.rank, WIDTH), fill, np.float32)
            found[f"{key}_B.weight"] = np.full((WIDTH, spec.rank), fill, np.float32)
    return found


def write_adapter(
    directory: Path,
    edit: Callable[[dict[str, Any], Tensors], None] | None = None,
    *,
    spec: LoraSpec = SPEC,
    fill: float = 0.1,
) -> str:
    """Write the directory; returns the sha256 of its tensors, as the trainer would tell it."""
    config: dict[str, Any] = {"peft_type": "LORA", "r": spec.rank, "lora_alpha": spec.alpha, "bias": "none"}
    content = tensors(spec, fill)
    if edit is not None:
        edit(config, content)
    directory.mkdir(parents=True)
    data = save(content)
    (directory / "adapter_model.safetensors").write_bytes(data)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return hashlib.sha256(data).hexdigest()
