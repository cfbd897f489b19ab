"""Tiny models, the built-in sampler as a process, and plain transformers as the reference for the protocol's suite.

Does not cover: fixtures (`conftest`).
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parents[3]
EOS = 256
SHAPE = dict(
    vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
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


def start_builtin(model_dir: Path, *extra: str) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "workers.sampler.builtin", "--model", str(model_dir), "--served-model-name", "base",
         "--port", str(port), "--dtype", "float32", "--threads", "1", "--max-loras", "4",
         "--max-lora-rank", "16", *extra],
        cwd=ROOT,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return process, url
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    process.kill()
    raise RuntimeError(f"the sampler did not start, exit status {process.wait(10)}")


def teacher_forced(model: Any, ids: list[int]) -> list[float]:
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(log_probs[i - 1, ids[i]]) for i in range(1, len(ids))]


AdapterMaker = Callable[..., Path]
