"""The command line and environment of a vLLM server, from settings, base model and hardware. vLLM is never imported.

Does not cover: starting and watching it (`workers.sampler.keeper`), nor whether it is the engine to take (`engines`).
Facts of vLLM 0.32 that decided a flag are in docs/decisions/007.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from app.core.settings import Settings
from app.models.catalogue import BaseModel
from workers.devices import Gpu, Shares, has_bf16, share, visible_only
from workers.sampler.launch import HOST, OFFLINE, Launch

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank accepts
# Without the first, the two adapter routes do not exist.
ENVIRONMENT = {
    **OFFLINE,
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_COLOR": "0",
}


def lora_rank(wanted: int) -> int:
    """The smallest maximum that vLLM takes and that is at least `wanted`."""
    return next(rank for rank in RANKS if rank >= wanted)


def dtype(settings: Settings, gpus: Sequence[Gpu]) -> str:
    """Said, never left to vLLM: its `auto` makes float16 of a float32 model, which the trainer cannot match."""
    if settings.sampler_dtype != "auto":
        return settings.sampler_dtype
    return "bfloat16" if has_bf16(gpus) else "float32"


class Vllm:
    """vLLM in its own virtual environment. Raises `NotEnoughGpus` when the settings ask for more than there is.

    Several servers, not vLLM's own data parallelism: each loads adapters, is proved and is replaced by itself.
    """

    name = "vllm"

    def __init__(self, settings: Settings, python: Path, gpus: Sequence[Gpu]) -> None:
        self._settings = settings
        self.python = python
        self.gpus = tuple(gpus)
        self.dtype = dtype(settings, gpus)
        self.shares: Shares | None = (
            share(
                gpus,
                servers=settings.vllm_data_parallel,
                width=settings.vllm_tensor_parallel,
                memory=settings.vllm_gpu_memory,
            )
            if gpus
            else None
        )

    @property
    def servers(self) -> int:
        """On a CPU one: a second would only share the same cores."""
        return self._settings.vllm_data_parallel if self.shares is not None else 1

    def launch(self, model: BaseModel, server: int, port: int) -> Launch:
        module = ("-m", "vllm.entrypoints.openai.api_server")
        command = (str(self.python), *module, *self._options(model, port), *shlex.split(self._settings.vllm_args))
        # Without a GPU, vLLM 0.32 rewinds a seeded generator when a prompt is computed in parts, which torch's lacks.
        seeds = self.shares is not None
        return Launch(command, self._environment(server), self.dtype, self.max_lora_rank(model), seeds)

    def max_lora_rank(self, model: BaseModel) -> int:
        """Without a GPU every token gathers its adapter up to this rank, used or not: 64 for 16 is 4× the work."""
        if self.shares is None and "sampler_max_lora_rank" not in self._settings.model_fields_set:
            return lora_rank(model.lora_rank)
        return lora_rank(self._settings.sampler_max_lora_rank)

    def _options(self, model: BaseModel, port: int) -> list[str]:
        settings = self._settings
        slots = settings.sampler_max_adapters
        options: dict[str, object] = {
            "--model": model.path,
            "--served-model-name": model.id,
            "--host": HOST,
            "--port": port,
            "--dtype": self.dtype,
            "--max-model-len": min(model.context, settings.sampler_max_model_len),
            "--max-loras": slots,
            "--max-cpu-loras": 2 * slots,  # one that left its slot comes back from memory, not from disk
            "--max-lora-rank": self.max_lora_rank(model),
            # Sampling defaults of the model's own generation_config are of no use here: every field is sent.
            "--generation-config": "vllm",
        }
        if self.shares is not None:
            options["--tensor-parallel-size"] = settings.vllm_tensor_parallel
            options["--gpu-memory-utilization"] = self.shares.sampler_memory
        flat = ["--enable-lora", "--disable-uvicorn-access-log"]
        flat += [str(part) for pair in options.items() for part in pair]
        if self.shares is None:
            flat.append("--enforce-eager")
        # Also keeps the head out of LoRA: there, scoring a prompt beside another request ends the engine on a CPU.
        return [*flat, "--lora-target-modules", *model.lora_targets]

    def _environment(self, server: int) -> dict[str, str]:
        if self.shares is None:
            return {**ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": str(self._settings.vllm_cpu_kv_gib)}
        return {**ENVIRONMENT, **visible_only(self.shares.samplers[server])}
