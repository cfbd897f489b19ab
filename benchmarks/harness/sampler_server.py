"""A sampler of either engine as a process, without a service around it, with the command line of the keeper.

Does not cover: adapters (`adapters`). vLLM runs where HONE_TEST_VLLM_PYTHON names the Python of its environment.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx

from app.core.settings import Settings
from app.models.catalogue import BaseModel
from app.net.clients import operator_client
from app.samplers.client import SamplerClient
from deploy.local.ports import free_port
from workers.devices import gpus
from workers.process import Child, spawn_on_leash
from workers.sampler.last_words import last_words
from workers.sampler.launch import BuiltIn, Engine
from workers.sampler.vllm import Vllm

VLLM_PYTHON = "HONE_TEST_VLLM_PYTHON"
START_S = 600.0


class SamplerDidNotStart(Exception):
    """Its last words are the message."""


def engines() -> tuple[str, ...]:
    """The engines that can be measured here."""
    return ("builtin", "vllm") if os.environ.get(VLLM_PYTHON) else ("builtin",)


@contextmanager
def sampler(
    engine: str,
    model: BaseModel,
    scratch: Path,
    *,
    dtype: str,
    threads: int,
    slots: int = 4,
    rank: int = 16,
    length: int,
) -> Iterator[tuple[str, float]]:
    """Address of a healthy server of `model`, and the seconds it took to become one."""
    settings = Settings(
        data_dir=scratch, sampler_dtype=dtype, sampler_max_adapters=slots, sampler_max_lora_rank=rank,
        sampler_max_model_len=length, threads=threads,
    )  # fmt: skip
    kind: Engine = BuiltIn(settings) if engine == "builtin" else Vllm(settings, Path(os.environ[VLLM_PYTHON]), gpus())
    port = free_port()
    launch, log, began = kind.launch(model, 0, port), scratch / f"{engine}.log", time.monotonic()
    child = spawn_on_leash(launch.command, log=log, environment=launch.environment)
    try:
        url = f"http://127.0.0.1:{port}"
        _await_health(url, child, log)
        yield url, time.monotonic() - began
    finally:
        child.stop(10.0)


@asynccontextmanager
async def client(url: str) -> AsyncIterator[SamplerClient]:
    async with operator_client(timeout_s=600) as http:
        yield SamplerClient(http, url)


def _await_health(url: str, child: Child, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and child.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SamplerDidNotStart(last_words(log))
