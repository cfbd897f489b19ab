"""The engines under test in either precision, and the small model they serve.

Does not cover: the protocol (`tests/contract/sampler`).
"""

from __future__ import annotations

import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from app.core.settings import Settings
from app.models.catalogue import ALL_LINEAR, BaseModel
from tests.contract.sampler.servers import SHAPE, VLLM_PYTHON, write_tokenizer
from workers.process import spawn_on_leash
from workers.sampler.last_words import last_words
from workers.sampler.launch import BuiltIn
from workers.sampler.vllm import Vllm

START_S = 240.0
RANK, ALPHA = 8, 16


def write_model(directory: Path) -> Path:
    """Four layers, random weights large enough that the next token is no coin toss."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(7)
    shape = {**SHAPE, "num_hidden_layers": 4, "intermediate_size": 256, "initializer_range": 0.1}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


@contextmanager
def serving(engine: str, dtype: str, model: Path, scratch: Path, slots: int = 8) -> Iterator[str]:
    """The URL of a server that its own launcher described; `engine` is builtin or vllm, its base is named `base`."""
    settings = Settings(
        data_dir=scratch, sampler_dtype=dtype, sampler_max_adapters=slots, sampler_max_lora_rank=RANK,
        sampler_max_model_len=512, threads=1, vllm_cpu_kv_gib=1,
    )  # fmt: skip
    launcher = BuiltIn(settings) if engine == "builtin" else Vllm(settings, Path(os.environ[VLLM_PYTHON]), [])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = BaseModel("base", model, "hermes", 512, ALL_LINEAR, 1e-4, RANK, "apache-2.0", None, 0)
    launch = launcher.launch(base, 0, port)
    log, url = scratch / f"{engine}-{dtype}.log", f"http://127.0.0.1:{port}"
    child = spawn_on_leash(launch.command, log=log, environment=launch.environment)
    try:
        deadline = time.monotonic() + START_S
        while not _healthy(url):
            if child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the sampler did not start: {last_words(log)}")
            time.sleep(0.2)
        yield url
    finally:
        child.stop(10.0)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
