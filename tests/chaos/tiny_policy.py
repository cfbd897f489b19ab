"""The policy of the storm's engine and trainer: log-probs that both compute alike from ids and an adapter's bytes.

Does not cover: a model. Tokens have fixed log-probs, an adapter adds its own to each; version 0 (B = 0) adds nothing,
so all gates of a publication's proof are taken on real figures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from workers.messages import LoraSpec

Tensors = dict[str, NDArray[np.float32]]

CLASSES = 64  # tokens that an adapter tells apart
INTO = 8
LARGEST = 0.4  # nats; base log-probs are below -0.5, so that none ever reaches 0
STEP = 0.02
TENSOR_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


def log_probs(ids: Sequence[int], adapter: NDArray[np.float64] | None) -> list[float]:
    """Of `ids[1:]`, each after the one before it."""
    found = []
    for before, token in pairwise(ids):
        base = -0.5 - ((before * 7919 + token * 104729) % 2000) / 1000
        found.append(base if adapter is None else base + float(adapter[token % CLASSES]))
    return found


def read_adapter(data: bytes) -> NDArray[np.float64]:
    """What it adds, by class of token: the mean of its B matrices."""
    matrices = [tensor for name, tensor in sorted(load(data).items()) if "lora_B" in name]
    added: NDArray[np.float64] = np.mean([b.ravel()[:CLASSES].astype(np.float64) for b in matrices], axis=0)
    return added


@dataclass(frozen=True)
class Standing:
    """A trainer's whole state. `chain` names every batch that went into it, in order: the state cannot be mistaken."""

    step: int
    chain: str
    tensors: Tensors

    @staticmethod
    def first(lora: LoraSpec, seed: int) -> Standing:
        drawn = np.random.default_rng(seed)
        tensors: Tensors = {}
        for target in lora.targets:
            name = f"base_model.model.model.layers.0.{target}"
            tensors[f"{name}.lora_A.weight"] = drawn.normal(size=(lora.rank, INTO)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = np.zeros((-(-CLASSES // lora.rank), lora.rank), np.float32)
        return Standing(0, hashlib.sha256(str(seed).encode()).hexdigest(), tensors)

    def after(self, step: int, batch_sha256: str) -> Standing:
        """One update: a pure function of this state and the batch, as a real one is of its snapshot."""
        chain = hashlib.sha256(f"{self.chain} {step} {batch_sha256}".encode()).hexdigest()
        drawn = np.random.default_rng(int(chain[:16], 16))
        tensors = {
            name: np.clip(t + drawn.normal(scale=STEP, size=t.shape), -LARGEST, LARGEST).astype(np.float32)
            if "lora_B" in name
            else t
            for name, t in self.tensors.items()
        }
        return Standing(step, chain, tensors)


def number(chain: str) -> float:
    """A chain as a metric: 48 bits, exact in a float."""
    return float(int(chain[:12], 16))


def adapter_files(at: Standing, lora: LoraSpec, writer: str) -> Mapping[str, bytes]:
    """A PEFT directory. It names its writer, so that two attempts never write the same bytes."""
    config = {"peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha, "bias": "none", "written_by": writer}
    return {
        TENSOR_FILE: save(at.tensors, metadata={"format": "pt", "chain": at.chain}),
        CONFIG_FILE: json.dumps(config).encode(),
    }


def chain_of(data: bytes) -> str:
    """The chain that an adapter's file carries."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return str(header["__metadata__"]["chain"])
