"""What supervisor and trainer say to each other: frozen dataclasses, one JSON line each.

Does not cover: how the descriptors are opened and what happens at end-of-file — see `workers.process` (supervisor side)
and `workers.trainer.pipe` (trainer side). Bulk data never travels here: a batch is a file (`workers.batch`), and the
message carries its path and digest. A line is at most 64 KiB (design §6.4); stdout is never used: libraries print.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

MAX_LINE_BYTES = 64 * 1024


class ProtocolError(Exception):
    """A line that is not one of the messages below: too long, not JSON, unknown type or wrong fields."""


@dataclass(frozen=True)
class LoraSpec:
    """Shape of the adapter. `targets` are module-name suffixes as PEFT takes them."""

    rank: int
    alpha: int
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Start:
    """Supervisor → trainer, once: what to train and where to write. All paths are absolute.

    `adapter_prefix` is `<job>-a<attempt>`; version N is published as `<adapters_dir>/<adapter_prefix>-v<N>/`.
    `snapshot` (resume) is a directory written by an earlier attempt, already digest-checked by the supervisor; then the
    first published version is the step it was taken at, otherwise v0 (seeded A, B = 0).
    `canary` is a JSON file with a list of token-id lists; the trainer scores them after every publication.
    `dtype` is the compute type of the forward pass: "bfloat16" or "float32"; adapter weights are always fp32.
    `beta` weighs the KL to the base (0: none). `importance_range` (low, high) masks tokens whose probability ratio
    trainer / sampler is outside, `max_sequence_tv` rows whose mean |ratio - 1| / 2 is above; None masks nothing.
    `processes` ranks share one update on this host, one GPU each where there are GPUs; `threads` is for all together.
    `shard_base` splits the frozen base over the ranks. `gpu_memory_share` caps what each process may take of its GPU.
    """

    job_id: str
    model_path: str
    adapters_dir: str
    snapshots_dir: str
    adapter_prefix: str
    canary: str
    seed: int
    total_steps: int
    learning_rate: float
    loss_type: str
    lora: LoraSpec
    dtype: str
    threads: int
    snapshot: str | None = None
    temperature: float = 1.0
    max_grad_norm: float = 1.0
    epsilon: float = 0.2
    beta: float = 0.0
    importance_range: tuple[float, float] | None = None
    max_sequence_tv: float | None = None
    processes: int = 1
    shard_base: bool = False
    gpu_memory_share: float | None = None


@dataclass(frozen=True)
class Step:
    """Supervisor → trainer: do optimizer step `step` (1-based) on this batch file (see `workers.batch`)."""

    step: int
    batch: str
    sha256: str


@dataclass(frozen=True)
class Stop:
    """Supervisor → trainer: exit 0 after what is running; everything worth keeping is already on disk."""


@dataclass(frozen=True)
class Published:
    """An adapter directory, complete and fsynced, under its final name. `sha256` is over the tensor file."""

    version: int
    name: str
    path: str
    sha256: str
    canary_log_probs: str  # JSON file beside the adapter: log-probs of each canary; fp32, or `Start.dtype` if sharded


@dataclass(frozen=True)
class Ready:
    """Trainer → supervisor: model loaded, first version published. `step` is 0, or the step of the snapshot."""

    step: int
    adapter: Published
    seconds: float


@dataclass(frozen=True)
class Progress:
    """Trainer → supervisor: still alive and moving. `done` of `total` units of `phase` ("load", "update", …)."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class StepDone:
    """Trainer → supervisor: step taken, adapter published, snapshot on disk (in that order of durability).

    `metrics`: flat name → float, listed in `workers.trainer.diagnostics`; besides loss, grad_norm and learning_rate.
    `seconds`: update, publication, snapshot, canary.
    """

    step: int
    adapter: Published
    snapshot: str
    snapshot_sha256: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """Trainer → supervisor, last words: class name, message and the tail of the traceback."""

    error: str
    message: str
    traceback: str


Message = Start | Step | Stop | Ready | Progress | StepDone | Failed

_BY_TYPE: dict[str, type[Any]] = {cls.__name__: cls for cls in (Start, Step, Stop, Ready, Progress, StepDone, Failed)}
_NESTED: dict[str, type[Any]] = {"adapter": Published, "lora": LoraSpec}


def encode(message: Message) -> bytes:
    """One line, newline included. Raises `ProtocolError` above 64 KiB."""
    line = json.dumps({"type": type(message).__name__, **asdict(message)}, separators=(",", ":")).encode() + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise ProtocolError(f"{type(message).__name__} is {len(line)} bytes; the limit is {MAX_LINE_BYTES}")
    return line


def decode(line: bytes) -> Message:
    """The message in one line. Raises `ProtocolError` with the reason."""
    if len(line) > MAX_LINE_BYTES:
        raise ProtocolError(f"line of {len(line)} bytes; the limit is {MAX_LINE_BYTES}")
    try:
        data = json.loads(line)
        cls = _BY_TYPE[data.pop("type")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProtocolError(f"not a message: {line[:80]!r}") from error
    known = {f.name for f in fields(cls)}
    if unknown := set(data) - known:
        raise ProtocolError(f"{cls.__name__}: unknown fields {sorted(unknown)}")
    try:
        for name, nested in _NESTED.items():
            if name in data:
                values = data[name]
                if nested is LoraSpec:
                    values = {**values, "targets": tuple(values["targets"])}
                data[name] = nested(**values)
        if data.get("importance_range") is not None:
            data["importance_range"] = tuple(data["importance_range"])
        message: Message = cls(**data)
    except (TypeError, KeyError) as error:
        raise ProtocolError(f"{cls.__name__}: {error}") from error
    return message
