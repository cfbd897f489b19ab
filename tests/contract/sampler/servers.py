"""Tiny models, samplers as processes, and plain transformers as the reference for the protocol's suite.

Does not cover: fixtures (`conftest`).
"""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from app.core.settings import Settings
from app.models.catalogue import ALL_LINEAR, BaseModel
from workers.process import Child, spawn_on_leash
from workers.sampler.last_words import last_words
from workers.sampler.launch import BuiltIn, Engine
from workers.sampler.vllm import Vllm

VLLM_PYTHON = "HONE_TEST_VLLM_PYTHON"
ENGINES = ("builtin", "vllm") if VLLM_PYTHON in os.environ else ("builtin",)
START_S = 180.0
SLOTS = 4
CONTEXT = 512
EOS = 256
# vLLM's attention on a CPU takes no head of 16: the shape is the smallest with heads of 32.
SHAPE = dict(
    vocab_size=288, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=257, eos_token_id=EOS, pad_token_id=258,
    tie_word_embeddings=True, initializer_range=0.2,
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    url: str
    model_dir: Path
    max_length: int
    vocabulary: int
    builtin: bool  # the built-in engine is stricter than vLLM where vLLM serves garbage

    @property
    def block(self) -> int:
        """Tokens of the shortest prefix that is cached: vLLM keeps whole blocks, of 128 on a CPU."""
        return 1 if self.builtin else 128


def write_tokenizer(directory: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<bos>", "<pad>"])
    tokenizer.save(str(directory / "tokenizer.json"))


def write_model(directory: Path, family: str) -> None:
    torch.manual_seed(7)
    model = (
        LlamaForCausalLM(LlamaConfig(**SHAPE))
        if family == "llama"
        else Qwen3ForCausalLM(Qwen3Config(head_dim=32, **SHAPE))
    )
    model.save_pretrained(directory)
    write_tokenizer(directory)


def engine(name: str, directory: Path) -> Engine:
    """The engine's own launcher, in fp32, with four slots for adapters of rank 16."""
    settings = Settings(
        data_dir=directory, sampler_dtype="float32", sampler_max_adapters=SLOTS, sampler_max_lora_rank=16,
        sampler_max_model_len=CONTEXT, threads=1, vllm_cpu_kv_gib=1,
    )  # fmt: skip
    return BuiltIn(settings) if name == "builtin" else Vllm(settings, Path(os.environ[VLLM_PYTHON]), [])


@contextmanager
def running(name: str, directory: Path) -> Iterator[tuple[Child, str]]:
    """A server of the model in `directory`, under the name `base`, as the keeper starts it; gone afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = BaseModel("base", directory, "hermes", CONTEXT, ALL_LINEAR, 1e-4, 4, "apache-2.0", None, 0)
    launch = engine(name, directory).launch(model, 0, port)
    log = directory / f"{name}.log"
    child = spawn_on_leash(launch.command, log=log, environment=launch.environment)
    try:
        url = f"http://127.0.0.1:{port}"
        _await_health(url, child, log)
        yield child, url
    finally:
        child.stop(10.0)


def _await_health(url: str, child: Child, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and child.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the sampler did not start: {last_words(log)}")


def write_adapter(
    parent: Path,
    model_dir: Path,
    name: str,
    *,
    seed: int = 0,
    scale: float = 0.3,
    edit: Callable[[dict[str, Any], dict[str, Any]], None] | None = None,
) -> Path:
    """PEFT files for all linear layers under `parent`/`name`; `edit` breaks them."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, layer in skeleton.named_modules():
        if isinstance(layer, torch.nn.Linear) and "lm_head" not in module:
            key = f"base_model.model.{module}.lora"
            tensors[f"{key}_A.weight"] = torch.randn(4, layer.in_features, generator=generator) * 0.2
            tensors[f"{key}_B.weight"] = torch.randn(layer.out_features, 4, generator=generator) * scale
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model_dir), "r": 4,
        "lora_alpha": 8, "bias": "none", "use_rslora": False, "use_dora": False, "inference_mode": True,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }  # fmt: skip
    if edit is not None:
        edit(config, tensors)
    path = parent / name
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def teacher_forced(model: Any, ids: list[int]) -> list[float]:
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(log_probs[i - 1, ids[i]]) for i in range(1, len(ids))]


AdapterMaker = Callable[..., Path]
