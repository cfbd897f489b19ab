"""Models of random weights in the shapes that published figures are about, made once per shape and precision.

Does not cover: a model that can do anything. Made offline; kept below the system's temporary directory. The text side
is that of the tests' tiny models, its vocabulary filled up with entries that no text leads to.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from app.models.catalogue import CARD, BaseModel, read_card, write_card
from benchmarks.harness.taught_model import kept
from tests.tiny import make_tiny_llama, make_tiny_qwen3


@dataclass(frozen=True)
class Shape:
    """`family`: llama or qwen3. `context` in tokens."""

    family: str
    context: int
    config: dict[str, Any] = field(default_factory=dict)


SHAPES = {
    # Heads of 32: vLLM's attention on a CPU takes none smaller.
    "tiny": Shape(
        "llama",
        16384,
        {
            "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 32,
        },
    ),
    # Qwen2.5-Math-1.5B and Qwen3-4B-Instruct, which the peers' figures are for.
    "1.5b": Shape(
        "llama",
        32768,
        {
            "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
            "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151936, "initializer_range": 0.02,
        },
    ),
    "4b": Shape(
        "qwen3",
        32768,
        {
            "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "initializer_range": 0.02,
        },
    ),
}  # fmt: skip


def random_model(shape: str, dtype: str) -> BaseModel:
    """The model of this shape with weights stored in `dtype` (bfloat16 or float32)."""
    return kept(f"{shape}-{dtype}", f"random-{shape}", lambda directory: _make(SHAPES[shape], dtype, directory))


def _make(shape: Shape, dtype: str, directory: Path) -> None:
    import torch

    make = make_tiny_qwen3 if shape.family == "qwen3" else make_tiny_llama
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        make(directory, **{"max_position_embeddings": shape.context, **shape.config})
    finally:
        torch.set_default_dtype(before)
    _fill_vocabulary(directory, int(shape.config.get("vocab_size", 0)))
    check = json.loads((directory / CARD).read_text())["check"]
    write_card(directory, replace(read_card(directory), context=shape.context), check)


def _fill_vocabulary(directory: Path, size: int) -> None:
    """A sampled id must have a text: an engine that decodes it fails otherwise."""
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    taken = {*vocabulary.values(), *(entry["id"] for entry in tokenizer["added_tokens"])}
    vocabulary.update({f"x{number}y": number for number in range(size) if number not in taken})
    path.write_text(json.dumps(tokenizer))
