"""How many processes share an update, read from a file in accelerate's own format (`deploy/accelerate/*.yaml`).

Does not cover: starting them (`workers.trainer.ranks`; decision 009: why not `accelerate launch`). Of the format we
read what we do and refuse what we do not, so that a file never promises more than what happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# Keys without a say here: the answer is fixed, or `Start` carries it.
IGNORED = frozenset(
    {"compute_environment", "debug", "main_training_function", "machine_rank", "rdzv_backend", "use_cpu"}
)
# key → the only value that is what happens.
FIXED: Mapping[str, object] = {"num_machines": 1, "same_network": True, "mixed_precision": "no", "downcast_bf16": "no"}
FSDP_FIXED: Mapping[str, object] = {
    "fsdp_version": 2,
    "fsdp_reshard_after_forward": True,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_offload_params": False,
    "fsdp_cpu_ram_efficient_loading": False,
    "fsdp_state_dict_type": "FULL_STATE_DICT",
}


class BadLaunch(Exception):
    """The file asks for something that the trainer does not do; the message names the key."""


@dataclass(frozen=True)
class Launch:
    """For `Start.processes` and `Start.shard_base`."""

    processes: int = 1
    shard_base: bool = False


def read_launch(path: Path) -> Launch:
    """Raises `BadLaunch` with file, key and what is possible."""
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise BadLaunch(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise BadLaunch(f"{path}: a mapping is expected, as `accelerate config` writes it")
    kind = config.pop("distributed_type", "NO")
    processes = config.pop("num_processes", 1)
    fsdp = config.pop("fsdp_config", None) or {}
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP"):
        raise BadLaunch(f"{path}: distributed_type {kind} is not supported; MULTI_GPU, MULTI_CPU and FSDP are")
    if not isinstance(processes, int) or processes < 1 or (kind == "NO" and processes > 1):
        raise BadLaunch(f"{path}: num_processes {processes!r} does not go with distributed_type {kind}")
    if fsdp and kind != "FSDP":
        raise BadLaunch(f"{path}: fsdp_config without distributed_type FSDP")
    _require(path, config, FIXED, IGNORED)
    _require(path, fsdp, FSDP_FIXED, frozenset())
    return Launch(processes, kind == "FSDP")


def _require(path: Path, values: Mapping[str, Any], fixed: Mapping[str, object], ignored: frozenset[str]) -> None:
    for key, value in values.items():
        if key in ignored:
            continue
        if key not in fixed:
            raise BadLaunch(f"{path}: {key} is not supported")
        if value != fixed[key]:
            raise BadLaunch(f"{path}: {key} {value!r} is not supported, only {fixed[key]!r}")
