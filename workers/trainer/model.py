"""The policy: a frozen base model from a local directory with a seeded LoRA adapter on top.

Does not cover: the trainer around it (`workers.trainer.grpo`), loading an adapter of an earlier attempt
(`workers.trainer.snapshot`).
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, set_seed

from workers.messages import LoraSpec
from workers.trainer import attention, layers
from workers.trainer.world import UnsupportedLaunch, World

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

# Config fields that change logits behind the head; such a model is scored by TRL's fused head on padded rows.
_LOGIT_FIELDS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class UnsupportedModel(Exception):
    """The directory or the request cannot be trained: unknown dtype, no matching LoRA target."""


def load_policy(path: str, dtype: str, lora: LoraSpec, seed: int) -> PeftModel:
    """Base weights in `dtype`, adapter weights in fp32: A kaiming-uniform from `seed`, B zero, no dropout.

    Raises `UnsupportedModel` with what is wrong; errors of transformers for an unreadable directory pass through.
    """
    if dtype not in DTYPES:
        raise UnsupportedModel(f"dtype {dtype!r} is none of {sorted(DTYPES)}")
    base = AutoModelForCausalLM.from_pretrained(
        path, dtype=DTYPES[dtype], attn_implementation="sdpa", local_files_only=True
    )
    return add_adapter(base, lora, seed)


def add_adapter(base: Any, lora: LoraSpec, seed: int) -> PeftModel:
    base.config.use_cache = False
    attention.register()
    if packs(base.config):
        base.set_attn_implementation(attention.NAME)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    set_seed(seed)
    try:
        policy = get_peft_model(base, config)
    except ValueError as error:
        raise UnsupportedModel(f"LoRA targets {list(lora.targets)}: {error}") from error
    trained = {name.rpartition(".")[2] for name, module in policy.named_modules() if hasattr(module, "lora_A")}
    if missing := {target.rpartition(".")[2] for target in lora.targets} - trained:
        raise UnsupportedModel(f"LoRA targets {sorted(missing)} match no module")
    layers.speed_up(policy)
    return policy


def shard_base(policy: PeftModel, world: World) -> None:
    """Split each frozen decoder layer over the ranks (FSDP2): a rank holds its part, and one whole layer while it runs.

    The adapter stays whole everywhere: it is small, it is what is published, and its gradients are summed by `World`.
    From then on every forward and backward pass is an exchange, so all ranks must make the same number of them.
    """
    base = policy.get_base_model()
    kinds = set(getattr(base, "_no_split_modules", None) or ())
    blocks = [module for module in base.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise UnsupportedLaunch(f"{type(base).__name__} does not say what its layers are; its base cannot be sharded")
    adapter = {parameter for parameter in policy.parameters() if parameter.requires_grad}
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world.size,))
    for block in blocks:
        # A block is a root of its own here, and a root would by default stay whole after its forward pass.
        fully_shard(block, mesh=mesh, ignored_params=adapter, reshard_after_forward=True)


def attend(policy: PeftModel, *, as_trie: bool) -> None:
    """Switch between attention over a packed trie and over rows; only for models that pack."""
    wanted = attention.NAME if as_trie else "sdpa"
    base = policy.get_base_model()
    if base.config._attn_implementation != wanted:
        base.set_attn_implementation(wanted)


def packs(config: Any) -> bool:
    """Whether every layer is full attention and the logits are hidden @ Wᵀ, so that rows can be packed as a trie."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    windowed = getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)
    if getattr(text, "layer_types", None):
        windowed = False  # the types say it exactly
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    scaled = any(getattr(text, name, None) not in (None, 1.0) for name in _LOGIT_FIELDS)
    known = text.model_type in PACKED_FAMILIES
    return known and kinds == {"full_attention"} and not windowed and not capped and not scaled


# Families whose attention is the plain interface call; each is compared with the padded path in tests/unit/trainer.
PACKED_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
