"""The tiny models of the test suite are real ones: they load, they are seeded, they are small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from app.models.catalogue import BaseModel, read_card
from tests.tiny import make_tiny_llama, make_tiny_qwen3, make_weightless_llama, make_weightless_qwen3

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("make", "weightless", "architecture"),
    [
        (make_tiny_llama, make_weightless_llama, "LlamaForCausalLM"),
        (make_tiny_qwen3, make_weightless_qwen3, "Qwen3ForCausalLM"),
    ],
)
def test_a_tiny_model_loads_and_depends_on_its_seed_alone(
    tmp_path: Path, make: Callable[..., BaseModel], weightless: Callable[..., BaseModel], architecture: str
) -> None:
    first, again, other = (make(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert read_card(tmp_path / "a") == first
    weights = [(model.path / "model.safetensors").read_bytes() for model in (first, again, other)]
    assert weights[0] == weights[1] != weights[2]
    texts = {(model.path / "tokenizer.json").read_bytes() for model in (first, again, weightless(tmp_path / "d"))}
    assert len(texts) == 1
    model = transformers.AutoModelForCausalLM.from_pretrained(first.path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(first.path)
    assert type(model).__name__ == architecture
    assert model.num_parameters() < 200_000
    assert len(tokenizer) == model.config.vocab_size
