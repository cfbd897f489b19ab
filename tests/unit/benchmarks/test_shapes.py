"""Random-weight models: every id the model can sample has a text, and the card has the shape's context."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.harness import shapes
from benchmarks.harness.shapes import Shape, random_model
from tests.tiny import make_weightless_llama


def test_the_vocabulary_is_filled_up_to_the_size_of_the_head(tmp_path: Path) -> None:
    directory = tmp_path / "m"
    make_weightless_llama(directory)
    shapes._fill_vocabulary(directory, 3000)
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(3000))


def test_the_shapes_are_those_of_the_published_models() -> None:
    def parameters(shape: Shape) -> float:
        c = shape.config
        head = c["head_dim"]
        attention = c["hidden_size"] * head * 2 * (c["num_attention_heads"] + c["num_key_value_heads"])
        layer = attention + 3 * c["hidden_size"] * c["intermediate_size"]
        return float(c["num_hidden_layers"] * layer + c["vocab_size"] * c["hidden_size"]) / 1e9

    assert 1.5 < parameters(shapes.SHAPES["1.5b"]) < 1.6
    assert 4.0 < parameters(shapes.SHAPES["4b"]) < 4.1


def test_a_tiny_one_is_made_once() -> None:
    first, second = random_model("tiny", "float32"), random_model("tiny", "float32")
    assert first.path == second.path
    assert first.context == shapes.SHAPES["tiny"].context
