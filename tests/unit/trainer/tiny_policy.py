"""A tiny random model on disk, batches for it, and a channel that plays the supervisor.

Does not cover: real weights or real processes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from workers.batch import TrainingRow, write_batch
from workers.messages import LoraSpec, Message, Start, Step, Stop

M = TypeVar("M")
VOCABULARY = 97
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}


def save_model(directory: Path, family: str = "llama", seed: int = 0, window: int | None = None) -> Path:
    """Two layers, grouped heads, weights large enough that tokens differ in probability."""
    torch.manual_seed(seed)
    config = CONFIGS[family](
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.15,
        **({"sliding_window": window} if family == "mistral" else {}),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def make_rows(seed: int, groups: int = 4, siblings: int = 4) -> list[TrainingRow]:
    """Groups behind one common prefix, with a masked tool result in the middle; log-probs are made up."""
    rng = random.Random(seed)
    shots = [rng.randrange(VOCABULARY) for _ in range(30)]
    rows = []
    for group in range(groups):
        question = shots + [rng.randrange(VOCABULARY) for _ in range(rng.randint(3, 8))]
        for _ in range(siblings):
            call, result, answer = ([rng.randrange(4) for _ in range(rng.randint(1, 9))] for _ in range(3))
            mask = [0] * len(question) + [1] * len(call) + [0] * len(result) + [1] * len(answer)
            ids = question + call + result + answer
            log_probs = [-rng.uniform(2, 7) * m for m in mask]
            rows.append(TrainingRow(ids, mask, log_probs, rng.uniform(-1, 1), group))
    return rows


@dataclass
class Supervisor:
    """Plays the other end: hands out the messages in order, then `Stop`; keeps what it was sent."""

    script: list[Message]
    sent: list[Message] = field(default_factory=list)

    def receive(self) -> Message:
        return self.script.pop(0) if self.script else Stop()

    def send(self, message: Message) -> None:
        self.sent.append(message)

    def of(self, kind: type[M]) -> list[M]:
        return [message for message in self.sent if isinstance(message, kind)]


def make_start(root: Path, model: Path, attempt: int = 1, **changes: object) -> Start:
    canary = root / "canary.json"
    canary.write_text("[[1, 2, 3, 4, 5], [1, 2, 9]]")
    values: dict[str, object] = {
        "job_id": "job",
        "model_path": str(model),
        "adapters_dir": str(root / "adapters"),
        "snapshots_dir": str(root / f"a{attempt}" / "snapshots"),
        "adapter_prefix": f"job-a{attempt}",
        "canary": str(canary),
        "seed": 7,
        "total_steps": 3,
        "learning_rate": 1e-2,
        "loss_type": "dapo",
        "lora": LoraSpec(4, 8, LINEAR),
        "dtype": "float32",
        "threads": 1,
    }
    return Start(**{**values, **changes})  # type: ignore[arg-type]


def make_step(root: Path, step: int, rows: Sequence[TrainingRow]) -> Step:
    path = root / "batches" / f"{step}.safetensors"
    return Step(step, str(path), write_batch(path, rows))
