"""An unloaded version gives its weights and its cached text back at once, without waiting for the cycle collector."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.sampler.servers import write_adapter
from tests.unit.builtin.test_lane import directory, loaded
from workers.sampler.builtin.engine import Engine, Limits
from workers.sampler.builtin.generation import Generation
from workers.sampler.builtin.text import NoTokenizer

__all__ = ["directory"]


@pytest.fixture
def engine(directory: Path) -> Iterator[Engine]:
    engine = Engine(loaded(directory, torch.float32), NoTokenizer(), "base", Limits(2, 8))
    thread = threading.Thread(target=engine.run)
    thread.start()
    gc.disable()
    yield engine
    gc.enable()
    engine.stop()
    thread.join(10)


def gone(reference: weakref.ref[Any], within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while reference() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    return reference() is None


def test_weights_and_text_of_an_unloaded_version_are_freed_without_the_collector(
    engine: Engine, directory: Path, tmp_path: Path
) -> None:
    engine.load_adapter("v1", write_adapter(tmp_path, directory, "v1"), timeout_s=30)
    version: Any = engine.resolve("v1")
    ended: Future[Any] = Future()
    engine.submit(version, Generation(tuple(range(1, 40)), 4, ignore_eos=True), ended.set_result)
    ended.result(30)
    [segment] = version.lane.tree.match(torch.arange(1, 20).numpy(), 19)[:1]
    text, weights = weakref.ref(segment.keys), weakref.ref(version.weights.module)
    del segment, version

    engine.unload_adapter("v1")

    assert gone(text)
    assert gone(weights)
