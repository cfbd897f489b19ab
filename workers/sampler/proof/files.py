"""The files of an adapter version, checked before any sampler reads them: content, tensors, shapes, finite, readable.

vLLM answers 200 to an adapter with missing layers, wrong shapes or NaN weights, and then samples from another policy.
Does not cover: whether a sampler serves these files (`evidence`). No torch: headers and raw numbers are enough.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


class BrokenAdapter(Exception):
    """The directory must not be loaded; the message says which file or tensor is wrong."""


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    span: tuple[int, int]  # in the data behind the header


@dataclass
class AdapterFiles:
    """What every version of one run must look like. `model`: the base's directory, for its layers and their sizes."""

    model: Path
    rank: int
    alpha: float
    targets: tuple[str, ...]
    _first: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def check(self, directory: Path, sha256: str) -> None:
        """Raises `BrokenAdapter`. Reads the tensors once: 10 MB take 20 ms."""
        for path, bits in ((directory, 0o005), (directory / TENSORS, 0o004), (directory / CONFIG, 0o004)):
            if not path.exists():
                raise BrokenAdapter(f"{path} is missing")
            if path.stat().st_mode & bits != bits:
                raise BrokenAdapter(f"{path} is not readable for other users, such as a sampler's")
        self._check_config(directory / CONFIG)
        data = (directory / TENSORS).read_bytes()
        if (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise BrokenAdapter(f"{directory / TENSORS} has the sha256 {found[:12]}…, the trainer wrote {sha256[:12]}…")
        tensors = read_header(data, directory / TENSORS)
        self._check_set(tensors)
        start = 8 + int.from_bytes(data[:8], "little")
        for name, tensor in tensors.items():
            if not _finite(tensor, memoryview(data)[start + tensor.span[0] : start + tensor.span[1]]):
                raise BrokenAdapter(f"{name} holds values that are not finite")
        self._first = self._first or {name: tensor.shape for name, tensor in tensors.items()}

    def _check_config(self, path: Path) -> None:
        try:
            config: Any = json.loads(path.read_text())
        except ValueError as error:
            raise BrokenAdapter(f"{path} is not JSON: {error}") from error
        wanted = {"peft_type": "LORA", "r": self.rank, "lora_alpha": self.alpha, "bias": "none"}
        for key, value in wanted.items():
            if not isinstance(config, dict) or config.get(key) != value:
                raise BrokenAdapter(f"{path}: {key} is not {value!r}")
        for key in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern"):
            if config.get(key):
                raise BrokenAdapter(f"{path}: {key} changes what the weights mean")

    def _check_set(self, tensors: Mapping[str, Tensor]) -> None:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        modules = {name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in shapes}
        wanted = {f"{_PREFIX}{module}.lora_{x}.weight" for module in modules for x in "AB"}
        if odd := sorted(wanted ^ shapes.keys()):
            raise BrokenAdapter(f"{len(odd)} tensors are missing or surplus, the first is {odd[0]}")
        for target in self.targets:
            if not any(module == target or module.endswith(f".{target}") for module in modules):
                raise BrokenAdapter(f"no tensor belongs to the target {target}")
        base = base_shapes(self.model)
        kinds = {_kind(module) for module in modules}
        # Only kinds that the adapter has: what PEFT does not reach (fused experts, a tower of vision) is no fault.
        if missing := sorted({module for module in base if _kind(module) in kinds} - modules):
            raise BrokenAdapter(f"{len(missing)} layers are missing, the first is {missing[0]}")
        for module in sorted(modules):
            a, b = (shapes[f"{_PREFIX}{module}.lora_{x}.weight"] for x in "AB")
            out, into = base.get(module, (b[0], a[-1]))
            if (a, b) != ((self.rank, into), (out, self.rank)):
                raise BrokenAdapter(
                    f"{module} has the shapes {a} and {b}, not {(self.rank, into)} and {(out, self.rank)}"
                )
        first = self._first or shapes
        if changed := sorted(name for name in shapes.keys() | first.keys() if shapes.get(name) != first.get(name)):
            raise BrokenAdapter(f"{changed[0]} is not as in the first version of this run")


def read_header(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `BrokenAdapter` when it is none, or cut."""
    size = int.from_bytes(data[:8], "little")
    try:
        header: Any = json.loads(data[8 : 8 + size])
        found = {
            name: Tensor(one["dtype"], tuple(one["shape"]), tuple(one["data_offsets"]))
            for name, one in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenAdapter(f"{path} is not a safetensors file") from error
    if max((tensor.span[1] for tensor in found.values()), default=0) != len(data) - 8 - size:
        raise BrokenAdapter(f"{path} is cut or has a tail")
    return found


def base_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """[out, in] of every unquantised matrix of the base model, by module name; empty for other formats."""
    shapes: dict[str, tuple[int, int]] = {}
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, one in header.items():
            if name.endswith(".weight") and len(one["shape"]) == 2 and one["dtype"] in ("F64", "F32", "F16", "BF16"):
                shapes[name.removesuffix(".weight")] = (one["shape"][0], one["shape"][1])
    return shapes


def _kind(module: str) -> str:
    """The module's name without its layer's number."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", module)


def _finite(tensor: Tensor, raw: memoryview) -> bool:
    if tensor.dtype == "BF16":  # all exponent bits set: infinite or NaN
        return not bool(np.any(np.frombuffer(raw, np.uint16) & 0x7F80 == 0x7F80))
    if tensor.dtype not in _FLOATS:
        return False
    return bool(np.isfinite(np.frombuffer(raw, _FLOATS[tensor.dtype])).all())
