"""One tiny model per test session, and leave for the warnings that PEFT, TRL and transformers cause among themselves.

Does not cover: a warning that our own code causes; it stays an error.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_OFFLINE="1")  # as the trainer process does, before imports

import pytest
import tiny_policy
import torch

FOREIGN_WARNINGS = (
    # PEFT 0.21 and TRL 1.16 still say `gradient_checkpointing` to transformers 5.23.
    "ignore:.*gradient_checkpointing.* is deprecated and will be removed in v6:FutureWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for warning in FOREIGN_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_policy.save_model(tmp_path_factory.mktemp("models") / "llama")
