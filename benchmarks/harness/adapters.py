"""Policies with a LoRA adapter of random B, written as the trainer writes versions: so that a version is not the base.

Does not cover: training them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel

from app.models.catalogue import BaseModel
from workers.messages import LoraSpec, Published
from workers.trainer import publish
from workers.trainer.model import load_policy

B_STD = 0.02


def lora_of(model: BaseModel, rank: int) -> LoraSpec:
    return LoraSpec(rank, 2 * rank, model.lora_targets)


def random_policy(model: BaseModel, dtype: str, rank: int, *, seed: int = 0, std: float = B_STD) -> PeftModel:
    """The base in `dtype` with an fp32 adapter; the same seed is the same adapter in every dtype."""
    policy = load_policy(str(model.path), dtype, lora_of(model, rank), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(policy.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return policy.to("cuda") if torch.cuda.is_available() else policy


def write(policy: PeftModel, model: BaseModel, rank: int, directory: Path, version: int) -> Published:
    """Publish as version `version` of `bench`; without canary scores."""
    return publish.publish(
        policy,
        adapters_dir=directory,
        prefix="bench",
        version=version,
        lora=lora_of(model, rank),
        base=str(model.path),
        canary=[],
    )
