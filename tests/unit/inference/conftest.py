"""A catalogue with one model of bytes, and its renderer.

Does not cover: the database (`test_resolution`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from app.models.catalogue import BaseModel
from app.rendering.protocol import ChatRenderer
from app.rendering.registry import load_renderer
from app.rendering.tokens import TextTokenizer
from tests.unit.inference.model import make_byte_model


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def base(models_dir: Path) -> BaseModel:
    return make_byte_model(models_dir / "bytes")


@pytest.fixture(scope="session")
def renderer(base: BaseModel) -> ChatRenderer:
    return load_renderer(base)


@pytest.fixture(scope="session")
def encode(base: BaseModel) -> Callable[[str], list[int]]:
    return TextTokenizer.load(base.path, name=base.id).encode


@pytest.fixture(scope="session")
def end(renderer: ChatRenderer) -> int:
    return renderer.stop_token_ids[0]
