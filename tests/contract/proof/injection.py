"""Wrong policies behind a right name: what each gate says when a real engine serves something else than was trained.

The versions are the trainer's own: v0, a trained v1, and v2 one step of sign(gradient) further, which is what Adam's
first step does. The fault is put behind v2's name at the moment of loading, after the files were checked.
Does not cover: the arithmetic of the gates (`tests/unit/workers/test_proof.py`).
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from app.core.settings import Settings
from app.db.engine import Database, now
from app.db.tables import DEFAULT_PROJECT, Sampler
from app.models.catalogue import ALL_LINEAR
from app.samplers.service import Adapter, LiveSampler, Samplers
from tests.contract.proof.engines import ALPHA, RANK
from workers.messages import LoraSpec, Published
from workers.publication import PublicationUnproved, Publisher
from workers.sampler.policy import ServedPolicy
from workers.sampler.proof.files import AdapterFiles
from workers.trainer import model, publish, scoring
from workers.trainer.packing import plan_tree

TENSORS = "adapter_model.safetensors"
FAR_STEPS, FAR_RATE = 12, 1e-3  # v1 is a trained adapter, not a young one
SPEC = LoraSpec(RANK, ALPHA, ALL_LINEAR)


def canary(vocabulary: int, sequences: int = 2, tokens: int = 192) -> list[list[int]]:
    chance = random.Random(3)
    return [[chance.randrange(vocabulary) for _ in range(tokens)] for _ in range(sequences)]


class Trained:
    """The trainer's policy and its publications; `dtype` is that of its forward pass."""

    def __init__(
        self, base: Path, dtype: str, sequences: Sequence[Sequence[int]], directory: Path, prefix: str
    ) -> None:
        self.policy = model.load_policy(str(base), dtype, SPEC, seed=5)
        self.base, self.sequences, self.directory, self.prefix = base, sequences, directory, prefix
        self._chance = torch.Generator().manual_seed(11)

    def step(self, rate: float) -> None:
        """Every weight of the adapter moves by `rate` against the sign of its gradient."""
        vocabulary = self.policy.config.vocab_size
        rows = torch.randint(vocabulary, (4, 48), generator=self._chance).tolist()
        plan = plan_tree(rows, [[1] * 48 for _ in rows], torch.device("cpu"))
        advantages = torch.randn(4, generator=self._chance).repeat_interleave(47)
        loss = -(scoring.score_tree(self.policy, plan, 1.0).log_probs * advantages).mean()
        loss.backward()
        with torch.no_grad():
            for parameter in self.policy.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad.sign()
                    parameter.grad = None

    def publish(self, version: int) -> Published:
        scores = scoring.score_rows(self.policy, self.sequences, 1.0)
        return publish.publish(
            self.policy, adapters_dir=self.directory, prefix=self.prefix, version=version, lora=SPEC,
            base=str(self.base), canary=scores,
        )  # fmt: skip


# --- faults: what lies behind the name instead of v2 ----------------------------------------------------------------

Edit = Callable[[dict[str, Any]], None]


def not_a_number(tensors: dict[str, Any]) -> None:
    next(tensor for name, tensor in sorted(tensors.items()) if "lora_B" in name)[0, 0] = torch.nan


def wrong_shape(tensors: dict[str, Any]) -> None:
    name = next(name for name in sorted(tensors) if "lora_B" in name)
    tensors[name] = tensors[name][: tensors[name].shape[0] // 2].clone()


def missing_layer(tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


def the_base(tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()


EDITS: dict[str, Edit] = {
    "base": the_base, "NaN": not_a_number, "wrong shape": wrong_shape, "missing layer": missing_layer,
}  # fmt: skip
CORRUPT = ("NaN", "wrong shape", "missing layer")
SIZED = ("previous version", "base")
FAULTS = ("previous version", *EDITS)
RATES = (1e-3, 1e-4, 1e-5)


class Injecting(Samplers):
    """The real service, except that one name is loaded from another directory."""

    instead: tuple[str, Path] | None = None

    async def load(self, sampler: LiveSampler, adapter: Adapter) -> bool:
        if self.instead is not None and adapter.name.startswith(self.instead[0]):
            fault = self.instead[1].with_name(f"{adapter.name}-fault")
            shutil.copytree(self.instead[1], fault, dirs_exist_ok=True)
            adapter = replace(adapter, path=str(fault))
        return await super().load(sampler, adapter)


@dataclass(frozen=True)
class Row:
    """One line of the table. `caught`: by what, or None; `gates`: the figures, where a sampler gave any."""

    fault: str
    rate: float
    caught: str | None
    gates: dict[str, Any]
    checked: bool = False  # the fault was in the files before they were checked

    def __str__(self) -> str:
        a, b, c = (self.gates.get(gate) or {} for gate in "abc")

        def figure(value: float | None, form: str) -> str:
            return "-" if value is None else format(value, form)

        passed = "not resolvable" if b.get("verdict") == "not_resolvable" else "NOT CAUGHT"
        return (
            f"{self.fault:<17} {self.rate:<7.0e} {self.caught or ('-' if self.fault == 'none' else passed):<16} "
            f"{figure(a.get('mean_abs'), '.2e'):>9} {figure(a.get('limit_mean_abs'), '.2g'):>7} "
            f"{figure(a.get('k3'), '.1e'):>8} {figure(b.get('projection'), '+.3f'):>9} "
            f"{figure(b.get('noise_sd'), '.2g'):>8} {b.get('verdict', '-'):>14} {c.get('verdict', '-'):>14}"
        )


HEADER = (
    f"{'served':<17} {'step':<7} {'caught by':<16} {'mean':>9} {'limit':>7} {'k3':>8} {'project.':>9} {'sd':>8} "
    f"{'gate B':>14} {'gate C':>14}"
)


class Bench:
    """One engine at `url`; every step size is a run of its own with its own names, every case a version of that run."""

    def __init__(
        self, settings: Settings, database: Database, url: str, base: Path, sampler_dtype: str, trainer_dtype: str
    ) -> None:
        self.settings, self.database, self.url, self.base = settings, database, url, base
        self.dtypes = (sampler_dtype, trainer_dtype)
        self.canary = canary(json.loads((base / "config.json").read_text())["vocab_size"])

    async def register(self) -> None:
        async with self.database.begin() as session:
            session.add(
                Sampler(
                    id="sampler-1", project_id=DEFAULT_PROJECT, base_model="base", url=self.url, host="here",
                    adapter_root="", max_loras=8, info={}, started_at=now(), heartbeat=now() + 1e6,
                )
            )  # fmt: skip

    async def table(self, prefix: str) -> list[Row]:
        """Every fault at the middle step, the sized ones at the others too, and corrupt files before the check."""
        rows: list[Row] = []
        for number, rate in enumerate(RATES):
            middle = number == 1
            cases = [(fault, False) for fault in (FAULTS if middle else SIZED)]
            cases += [(fault, True) for fault in CORRUPT if middle]
            rows += await self._run(f"ftjob-{prefix}{number}-a1", rate, [*cases, ("none", False)])
        return rows

    async def _run(self, prefix: str, rate: float, cases: Sequence[tuple[str, bool]]) -> list[Row]:
        """Publish v0 and a trained v1 as they are, then one step further again and again, each with a fault behind it.

        A case that is caught is taken back, so that v1 stays the version before; "none" comes last.
        """
        directory = self.settings.adapters_dir / prefix
        trained = Trained(self.base, self.dtypes[1], self.canary, directory, prefix)
        samplers = Injecting(self.database, self.settings)
        policy = ServedPolicy(samplers, self.database, "base", prefix)
        files = AdapterFiles(self.base, SPEC.rank, SPEC.alpha, SPEC.targets)
        publisher = Publisher(policy, self.canary, self.dtypes, files=files)
        rows = []
        try:
            await publisher.publish(trained.publish(0))
            for _ in range(FAR_STEPS):
                trained.step(FAR_RATE)
            before = trained.publish(1)
            kept = shutil.copytree(before.path, directory / "v1-content")
            await publisher.publish(before)
            trained.step(rate)
            for version, (fault, checked) in enumerate(cases, start=2):
                right = trained.publish(version)
                self._inject(fault, right, kept, samplers, checked)
                rows.append(await self._publish(publisher, right, Row(fault, rate, None, {}, checked)))
                if rows[-1].caught is None and fault != "none":  # not caught: it must not become the version before
                    await policy.retire(version)
                    publisher._trained.forget(version)
        finally:
            await policy.retire_all()
            await samplers.close()
        return rows

    async def _publish(self, publisher: Publisher, right: Published, row: Row) -> Row:
        try:
            found = await publisher.publish(right)
        except PublicationUnproved as error:
            detail = error.detail or {}
            return replace(row, caught=_caught(detail), gates=dict(detail.get("gates") or {}))
        return replace(row, gates=found.as_dict()["gates"])

    def _inject(self, fault: str, right: Published, before: Path, samplers: Injecting, check: bool) -> None:
        samplers.instead = None
        if fault == "none":
            return
        directory = Path(right.path).with_name(f"{right.name}-other")
        shutil.copytree(before if fault == "previous version" else right.path, directory)
        if fault in EDITS:
            tensors = load_file(directory / TENSORS)
            EDITS[fault](tensors)
            save_file(tensors, directory / TENSORS, metadata={"format": "pt"})
        if check:
            (Path(right.path) / TENSORS).write_bytes((directory / TENSORS).read_bytes())
        else:
            samplers.instead = (right.name, directory)


def _caught(detail: dict[str, Any]) -> str:
    """The first thing that saw it: the files, the engine at load, the scores, or a gate."""
    if gates := detail.get("gates"):
        return "gate " + "+".join(gate.upper() for gate in "abc" if gates[gate]["verdict"] == "fails")
    reason = str(detail.get("reason"))
    if "load_lora_adapter" in reason:
        return "engine, at load"
    return "canary: no score" if "no scores" in reason else "files"


def show(title: str, rows: Sequence[Row]) -> None:
    print(f"\n{title}\n{HEADER}", *rows, sep="\n", flush=True)  # noqa: T201
