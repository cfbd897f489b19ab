"""Snapshots: everything the trainer needs to go on bit-exactly from a step, in one checked directory.

Does not cover: the supervisor's part of a resume (data cursor, consumed rows), deleting old snapshots (also its part).
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load, save
from torch import Tensor

from workers.trainer.durable import write_directory

MANIFEST = "manifest.json"
FORMAT = 1


class BrokenSnapshot(Exception):
    """A snapshot that cannot be trusted: file missing, digest wrong, or made for another adapter."""


@dataclass(frozen=True)
class TrainerState:
    """What a snapshot covers; `write` reads from these objects and `restore` writes into them."""

    policy: PeftModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.policy.named_parameters() if p.requires_grad}


def write_snapshot(directory: Path, step: int, state: TrainerState) -> tuple[Path, str]:
    """Write `<directory>/step-<step>/`; returns its path and the sha256 of the manifest."""
    trained = state.trained()
    files = {
        "adapter.safetensors": save({name: p.detach().cpu().contiguous() for name, p in trained.items()}),
        "optimizer.safetensors": save(_optimizer_tensors(trained, state.optimizer)),
        "rng.safetensors": save(_torch_rng()),
        "state.json": json.dumps(
            {
                "step": step,
                "scheduler": {k: v for k, v in state.scheduler.state_dict().items() if k != "lr_lambdas"},
                "learning_rates": [group["lr"] for group in state.optimizer.param_groups],
                "python_rng": random.getstate(),
                "numpy_rng": _numpy_rng(),
            }
        ).encode(),
    }
    manifest = json.dumps(
        {
            "format": FORMAT,
            "step": step,
            "files": {n: {"sha256": hashlib.sha256(d).hexdigest(), "size": len(d)} for n, d in files.items()},
        },
        indent=1,
    ).encode()
    final = directory / f"step-{step}"
    write_directory(final, {**files, MANIFEST: manifest})
    return final, hashlib.sha256(manifest).hexdigest()


def read_step(directory: Path) -> int:
    """The step a snapshot was taken at, from its manifest."""
    return int(_manifest(directory)["step"])


def restore_snapshot(directory: Path, state: TrainerState) -> int:
    """Verify `directory` against its manifest and load adapter, optimizer and scheduler; returns the step."""
    files = _verified(directory)
    trained = state.trained()
    adapter = load(files["adapter.safetensors"])
    if set(adapter) != set(trained) or any(adapter[n].shape != trained[n].shape for n in adapter):
        raise BrokenSnapshot(f"{directory}: made for an adapter of another shape")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(adapter[name])
    _load_optimizer(trained, state.optimizer, load(files["optimizer.safetensors"]))
    values = json.loads(files["state.json"])
    state.scheduler.load_state_dict({**values["scheduler"], "lr_lambdas": [None] * len(state.scheduler.lr_lambdas)})
    for group, rate in zip(state.optimizer.param_groups, values["learning_rates"], strict=True):
        group["lr"] = rate
    return int(values["step"])


def restore_generators(directory: Path) -> None:
    """Set the global random generators as they were. Apart, because TRL draws from them before the first step."""
    files = _verified(directory)
    _restore_rng(json.loads(files["state.json"]), load(files["rng.safetensors"]))


def _verified(directory: Path) -> dict[str, bytes]:
    return {name: _checked(directory / name, entry) for name, entry in _manifest(directory)["files"].items()}


def _manifest(directory: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise BrokenSnapshot(f"{directory}: manifest unreadable: {error}") from error
    if manifest.get("format") != FORMAT:
        raise BrokenSnapshot(f"{directory}: format {manifest.get('format')!r}, this trainer reads {FORMAT}")
    return manifest


def _checked(path: Path, entry: dict[str, Any]) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BrokenSnapshot(f"{path}: {error}") from error
    if len(data) != entry["size"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise BrokenSnapshot(f"{path}: content does not match the manifest")
    return data


def _optimizer_tensors(trained: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`<parameter>/<state name>`: exp_avg, exp_avg_sq, step. Keyed by name: order may change between versions."""
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in trained.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(
    trained: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    optimizer.state.clear()
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        parameter = trained[name]
        device = "cpu" if entry == "step" else parameter.device
        optimizer.state[parameter][entry] = value.to(device)


def _torch_rng() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _numpy_rng() -> list[Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return [kind, np.asarray(keys).tolist(), position, has_gauss, gauss]


def _restore_rng(values: dict[str, Any], torch_states: dict[str, Tensor]) -> None:
    version, keys, gauss = values["python_rng"]
    random.setstate((version, tuple(keys), gauss))
    kind, numpy_keys, position, has_gauss, cached = values["numpy_rng"]
    np.random.set_state((kind, np.asarray(numpy_keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch_states["cpu"])
    for index in range(torch.cuda.device_count()):
        if (state := torch_states.get(f"cuda{index}")) is not None:
            torch.cuda.set_rng_state(state, index)
