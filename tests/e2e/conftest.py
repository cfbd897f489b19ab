"""Taught tiny models, made once, and an installation that the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.service import Service
from tests.e2e.teach import teach
from tests.tiny import make_tiny_llama, make_tiny_qwen3


@pytest.fixture(scope="session")
def taught_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models directory with `tiny-llama` (Hermes rendering) and `tiny-qwen3` (Qwen's own tool format)."""
    models = tmp_path_factory.mktemp("taught") / "models"
    teach(make_tiny_llama(models / "tiny-llama"))
    teach(make_tiny_qwen3(models / "tiny-qwen3"))
    return models


@pytest.fixture(scope="module")
def service(taught_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("service"), taught_models) as running:
        yield running
