"""Which GPUs and how much of their memory the samplers get, and which are left to the trainer (design §6.11).

Does not cover: what a server needs to fit into its share; vLLM checks that itself when it starts. No torch: the driver
is asked through nvidia-smi.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROBE_S = 10.0
ALONE = 0.9  # of a GPU's memory; the rest is for the driver and for what libraries allocate by themselves
SHARED = 0.45  # each of sampler and trainer, when they must live on the same GPU
BF16_SINCE = 8.0  # compute capability (Ampere)
QUERY = ("nvidia-smi", "--query-gpu=index,uuid,name,memory.total,compute_cap", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Gpu:
    index: int
    uuid: str
    name: str
    memory_mib: int
    capability: float

    def __str__(self) -> str:
        return f"{self.index}: {self.name}, {self.memory_mib / 1024:.0f} GiB"


@dataclass(frozen=True)
class Shares:
    """`samplers`: the GPUs of each server of a base model. `shared`: the trainer has none to itself."""

    samplers: tuple[tuple[int, ...], ...]
    trainer: tuple[int, ...]
    sampler_memory: float
    trainer_memory: float
    shared: bool


@dataclass(frozen=True)
class TrainerShare:
    """The trainer's GPUs (none: it runs on the CPU) and the share of each one's memory it may take."""

    gpus: tuple[int, ...]
    memory: float

    def environment(self) -> dict[str, str]:
        """For the trainer's process; its ranks take one each of what is visible."""
        return visible_only(self.gpus) if self.gpus else {}


class NotEnoughGpus(Exception):
    """The message says what was asked for, what is there, and which settings to change."""


def gpus(environment: Mapping[str, str] | None = None) -> tuple[Gpu, ...]:
    """What nvidia-smi reports and CUDA_VISIBLE_DEVICES leaves. Nothing when there is no driver, or it hangs."""
    if shutil.which(QUERY[0]) is None:
        return ()
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=PROBE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = parse(done.stdout) if done.returncode == 0 else ()
    return visible(found, (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES"))


def parse(text: str) -> tuple[Gpu, ...]:
    """Lines of `QUERY`; a line of another shape (a card in an error state) is left out."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        try:
            index, uuid, name, memory, capability = parts
            found.append(Gpu(int(index), uuid, name, int(memory), float(capability)))
        except ValueError:
            continue
    return tuple(found)


def visible(found: Sequence[Gpu], named: str | None) -> tuple[Gpu, ...]:
    """As CUDA reads it: indices or (beginnings of) uuids, up to the first that does not exist; None: all."""
    if named is None:
        return tuple(found)
    kept: list[Gpu] = []
    for part in named.split(","):
        wanted = part.strip()
        match = next((g for g in found if wanted and (str(g.index) == wanted or g.uuid.startswith(wanted))), None)
        if match is None:
            break
        kept.append(match)
    return tuple(kept)


def share(found: Sequence[Gpu], *, servers: int, width: int, memory: float | None) -> Shares:
    """`servers` samplers of `width` GPUs each; what is left belongs to the trainer, or it shares all of them.

    `memory` overrides the samplers' share of each GPU. Raises `NotEnoughGpus`.
    """
    needed = servers * width
    if needed > len(found):
        raise NotEnoughGpus(
            f"{servers} vLLM servers of {width} GPUs need {needed}, this host shows {len(found)}: "
            "lower HONE_VLLM_DATA_PARALLEL or HONE_VLLM_TENSOR_PARALLEL"
        )
    order = [gpu.index for gpu in found]
    samplers = tuple(tuple(order[at : at + width]) for at in range(0, needed, width))
    left = tuple(order[needed:])
    if left:
        return Shares(samplers, left, memory or ALONE, ALONE, shared=False)
    taken = memory or SHARED
    return Shares(samplers, tuple(order), taken, round(max(0.0, ALONE - taken), 2), shared=True)


def visible_only(indices: Sequence[int]) -> dict[str, str]:
    """Let a process see these GPUs. nvidia-smi counts in PCI order; CUDA by itself puts the fastest card first."""
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(str(index) for index in indices)}


def has_bf16(found: Sequence[Gpu], flags: frozenset[str] | None = None) -> bool:
    """Do these GPUs, or the processor where there are none, multiply bfloat16 themselves?"""
    if found:
        return all(gpu.capability >= BF16_SINCE for gpu in found)
    return bool((cpu_flags() if flags is None else flags) & {"avx512_bf16", "amx_bf16"})


def cpu_flags() -> frozenset[str]:
    """The processor's feature flags as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    line = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())
