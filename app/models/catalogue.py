"""The base models of this installation: one directory each, described by its `hone.json`.

Does not cover: how a model gets here (`pull`, `register`), its tokens (`app.rendering`) or who serves it
(`app.samplers`). Layout: `<models_dir>/<id>/` holds `config.json`, `*.safetensors`, `tokenizer.json` and `hone.json`.
A directory without a `hone.json` is not a model: a pull that was killed leaves none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CARD = "hone.json"
ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class ModelError(Exception):
    """Root of what this room raises; the message says what to do."""


class UnknownModel(ModelError):
    """No such model here. `available` are the ids that would work."""

    def __init__(self, model_id: str, available: tuple[str, ...]) -> None:
        self.model_id, self.available = model_id, available
        there = ", ".join(available) if available else "no model is installed yet"
        super().__init__(f"unknown base model {model_id!r}; here: {there}. Install one with `hone models pull NAME`.")


class ModelNotAllowed(UnknownModel):
    """Here or not, this installation does not offer it."""

    def __init__(self, model_id: str, available: tuple[str, ...]) -> None:
        super().__init__(model_id, available)
        there = ", ".join(available) if available else "none of the allowed ones is installed"
        self.args = (f"the base model {model_id!r} is not offered by this server (HONE_MODELS_ALLOWED); here: {there}",)


def unusable(name: str) -> str:
    """What clients are told of a model whose files are not in order; the paths are for the operator."""
    return f"The model `{name}` is installed, but its files cannot be used; the log of the API says why."


class BrokenModel(ModelError):
    """A model directory whose description cannot be read or whose files are missing.

    `str` names the path and is for the operator; clients get `public`.
    """

    def __init__(self, place: Path, what: str) -> None:
        super().__init__(f"{place}: {what}")
        name = place.parent.name if place.name == CARD else place.name
        self.public = unusable(name)


@dataclass(frozen=True)
class BaseModel:
    """What the rest of the service knows about a base model.

    `renderer` is "hermes", "auto" or a name of the `renderers` package. `context` is in tokens. `base_learning_rate`
    is what `learning_rate_multiplier: 1` means. `lora_targets` are module-name suffixes as PEFT takes them. `created`
    is Unix time.
    """

    id: str
    path: Path
    renderer: str
    context: int
    lora_targets: tuple[str, ...]
    base_learning_rate: float
    lora_rank: int
    licence: str
    hub_id: str | None
    created: int


class Catalogue:
    """Reads the model directories on every call: they are few, and `hone models pull` may add one at any time."""

    def __init__(self, models_dir: Path, allowed: frozenset[str] | None = None) -> None:
        """allowed: the only ids that exist for whoever asks here; None: all that are installed."""
        self.models_dir = models_dir
        self.allowed = allowed

    def list(self) -> list[BaseModel]:
        """All models, by id. A broken one is left out here; `get` says what is wrong with it."""
        if not self.models_dir.is_dir():
            return []
        found = []
        for directory in sorted(self.models_dir.iterdir()):
            if not (directory / CARD).is_file() or ID_PATTERN.fullmatch(directory.name) is None:
                continue
            if self.allowed is not None and directory.name not in self.allowed:
                continue
            try:
                found.append(read_card(directory))
            except BrokenModel:
                continue
        return found

    def get(self, model_id: str) -> BaseModel:
        """Raises UnknownModel, or BrokenModel when the directory is there but cannot be used."""
        if self.allowed is not None and model_id not in self.allowed:
            raise ModelNotAllowed(model_id, tuple(model.id for model in self.list()))
        if ID_PATTERN.fullmatch(model_id) is None or not (self.models_dir / model_id / CARD).is_file():
            raise UnknownModel(model_id, tuple(model.id for model in self.list()))
        return read_card(self.models_dir / model_id)

    def check(self, model_id: str) -> Mapping[str, Any]:
        """The result of the append-only check made at registration (`app.rendering.check`)."""
        return read_check(self.get(model_id).path)


def allowed_models(setting: str) -> frozenset[str] | None:
    """`HONE_MODELS_ALLOWED` read: ids, comma-separated; None when nothing is listed."""
    return frozenset(name.strip() for name in setting.split(",") if name.strip()) or None


def read_card(directory: Path) -> BaseModel:
    """Read one model's `hone.json`; raises BrokenModel."""
    card = _load(directory)
    try:
        model = BaseModel(
            id=directory.name,
            path=directory.resolve(),
            renderer=str(card["renderer"]),
            context=int(card["context"]),
            lora_targets=tuple(str(target) for target in card["lora_targets"]),
            base_learning_rate=float(card["base_learning_rate"]),
            lora_rank=int(card["lora_rank"]),
            licence=str(card["licence"]),
            hub_id=None if card.get("hub_id") is None else str(card["hub_id"]),
            created=int(card["created"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        what = f"field {error} is missing or has the wrong type; register again"
        raise BrokenModel(directory / CARD, what) from error
    missing = [name for name in ("config.json", "tokenizer.json") if not (directory / name).is_file()]
    if not any(directory.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise BrokenModel(directory, f"{', '.join(missing)} not there; remove the directory and pull the model again")
    return model


def read_check(directory: Path) -> Mapping[str, Any]:
    """What the check at registration found; empty for a card without one. Raises BrokenModel."""
    result = _load(directory).get("check")
    return result if isinstance(result, dict) else {}


def write_card(directory: Path, model: BaseModel, check: Mapping[str, Any]) -> None:
    """Write `hone.json`. The id and the path are the directory itself and are not stored."""
    card = asdict(model)
    del card["id"], card["path"]
    text = json.dumps({**card, "check": dict(check)}, indent=2, ensure_ascii=False)
    (directory / CARD).write_text(text + "\n", encoding="utf-8")


def _load(directory: Path) -> dict[str, Any]:
    try:
        card = json.loads((directory / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BrokenModel(directory / CARD, f"cannot be read ({error}); register the model again") from error
    if not isinstance(card, dict):
        raise BrokenModel(directory / CARD, "not a JSON object; register the model again")
    return card
