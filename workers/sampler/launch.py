"""What the keeper needs to know to start a sampler: a command, its environment, and the precision it will compute in.

Does not cover: which engine is taken (`workers.sampler.engines`) and vLLM's own command (`workers.sampler.vllm`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from app.core.settings import Settings
from app.models.catalogue import BaseModel

HOST = "127.0.0.1"  # the load route of either engine takes any path its process can read: never another address
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@dataclass(frozen=True)
class Launch:
    """`dtype` None: the server finds out and says so under /version."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    dtype: str | None
    max_lora_rank: int
    seeds: bool = True  # False: a request with a seed may end the engine


class Engine(Protocol):
    """One way to serve a base model, in `servers` processes that each hold every adapter."""

    @property
    def name(self) -> str: ...

    @property
    def servers(self) -> int: ...

    def launch(self, model: BaseModel, server: int, port: int) -> Launch:
        """How server number `server` (from 0) is started on `port`."""


class BuiltIn:
    """The engine that comes with Hone; it takes the precision this host is fast in."""

    name = "builtin"
    servers = 1

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def launch(self, model: BaseModel, server: int, port: int) -> Launch:
        settings = self._settings
        options = {
            "--model": model.path,
            "--served-model-name": model.id,
            "--host": HOST,
            "--port": port,
            "--dtype": settings.sampler_dtype,
            "--max-model-len": min(model.context, settings.sampler_max_model_len),
            "--max-loras": settings.sampler_max_adapters,
            "--max-lora-rank": settings.sampler_max_lora_rank,
            "--threads": settings.cpu_threads,
        }
        flat = [str(part) for pair in options.items() for part in pair]
        command = (sys.executable, "-m", "workers.sampler.builtin", *flat)
        return Launch(command, OFFLINE, None, settings.sampler_max_lora_rank)
