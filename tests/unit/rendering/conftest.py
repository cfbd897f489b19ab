"""Renderers over the tokenizers of the tiny models; built once."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.models.catalogue import BaseModel
from app.rendering.protocol import ChatRenderer
from app.rendering.registry import build_renderer
from app.rendering.tokens import TextTokenizer
from tests.tiny import make_weightless_llama, make_weightless_qwen3


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return make_weightless_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return make_weightless_qwen3(tmp_path_factory.mktemp("models") / "tiny-qwen3")


@pytest.fixture(scope="session")
def hermes(tiny_llama: BaseModel) -> ChatRenderer:
    return build_renderer(tiny_llama)


@pytest.fixture(scope="session")
def qwen3(tiny_qwen3: BaseModel) -> ChatRenderer:
    return build_renderer(tiny_qwen3)


@pytest.fixture(scope="session")
def whole_text(tiny_llama: BaseModel) -> TextTokenizer:
    """The same tokenizer, reading control tokens in text: how a plain chat template would be tokenised."""
    tokenizer = TextTokenizer.load(Path(tiny_llama.path), name="whole")
    tokenizer.read_control_tokens(True)
    return tokenizer
