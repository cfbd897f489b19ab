"""Make a directory with a transformers model into a base model of this installation.

Does not cover: downloads (`pull`). Weights are hard-linked where the file system allows it, otherwise symbolically
linked; small files are copied, so that later edits in the source directory do not change a registered model's text
format.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.models.catalogue import ALL_LINEAR, CARD, ID_PATTERN, BaseModel, ModelError, read_card, write_card
from app.models.known import GENERIC, known
from app.rendering.check import check_append_only
from app.rendering.registry import build_renderer
from app.storage.local import sync

REQUIRED = ("config.json", "tokenizer.json")
SMALL_FILES = (
    *REQUIRED,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "LICENSE",
)
DEFAULT_CONTEXT = 4096  # when the config does not say how long the model may read


class NotAModel(ModelError):
    """The directory lacks something a base model needs; the message names it."""


class AlreadyRegistered(ModelError):
    """The id is taken by another model."""


def register(
    directory: Path,
    model_id: str,
    models_dir: Path,
    *,
    renderer: str | None = None,
    hub_id: str | None = None,
    licence: str | None = None,
    base_learning_rate: float | None = None,
    lora_rank: int | None = None,
    lora_targets: tuple[str, ...] | None = None,
    context: int | None = None,
    now: Callable[[], float] = time.time,
    place: Callable[[Path, Path], None] | None = None,
) -> BaseModel:
    """Register a local directory as `model_id`. What is not given comes from `known` by hub id or id.

    place: how a weight file gets from the directory into the model's (default: a link).

    Raises NotAModel, AlreadyRegistered; RenderingError when no renderer fits (the message lists the choices).
    """
    source = directory.resolve()
    require_files(source)
    if ID_PATTERN.fullmatch(model_id) is None:
        raise NotAModel(f"{model_id!r} is no model id: letters, digits, '.', '_' and '-', at most 100")
    if (models_dir / model_id).exists():
        raise AlreadyRegistered(f"{models_dir / model_id} exists; choose another --id or remove it first")
    defaults = known(hub_id or model_id) or GENERIC
    with staging(models_dir, model_id) as stage:
        for name in SMALL_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, stage / name)
        for weights in sorted(source.glob("*.safetensors")):
            (place or link_weights)(weights.resolve(), stage / weights.name)
        finish(
            stage,
            BaseModel(
                id=model_id,
                path=stage,
                renderer=renderer or defaults.renderer,
                context=context or _context(source / "config.json"),
                lora_targets=lora_targets or ALL_LINEAR,
                base_learning_rate=base_learning_rate or defaults.rate,
                lora_rank=lora_rank or defaults.rank,
                licence=licence or defaults.licence,
                hub_id=hub_id or defaults.hub_id or None,
                created=int(now()),
            ),
        )
        return publish(stage, models_dir / model_id)


def require_files(directory: Path) -> None:
    """Raises NotAModel unless config, tokenizer and safetensors weights are there."""
    missing = [name for name in REQUIRED if not (directory / name).is_file()]
    if not any(directory.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise NotAModel(
            f"{directory}: no {', no '.join(missing)}. A base model is a transformers directory with a fast tokenizer "
            "and safetensors weights (save it with `save_pretrained`)"
        )


@contextmanager
def staging(models_dir: Path, model_id: str) -> Iterator[Path]:
    """A hidden directory beside the target: renaming it is atomic, and a leftover is never taken for a model."""
    models_dir.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{model_id}-", dir=models_dir))
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def finish(stage: Path, model: BaseModel) -> None:
    """Prove that the model can be rendered, and write its card. Raises RenderingError when it cannot."""
    result: Mapping[str, Any] = check_append_only(build_renderer(model)).as_dict()
    write_card(stage, replace(model, path=stage), result)


def publish(stage: Path, target: Path) -> BaseModel:
    """Flush and rename. Whoever comes second to the same name gets the first one's model."""
    stage.chmod(0o755)
    for path in stage.iterdir():
        if not path.is_symlink():
            path.chmod(0o644)  # a trainer or sampler may run as another user
            sync(path)
    sync(stage)
    try:
        stage.rename(target)
    except OSError as error:
        if not (target / CARD).is_file():
            raise AlreadyRegistered(f"{target} is in the way and is no model: {error}; remove it first") from error
    sync(target.parent)
    return read_card(target)


def _context(config_json: Path) -> int:
    try:
        config = json.loads(config_json.read_text(encoding="utf-8"))
    except ValueError as error:
        raise NotAModel(f"{config_json}: not JSON ({error})") from error
    for part in (config, config.get("text_config") or {}):
        value = part.get("max_position_embeddings")
        if isinstance(value, int) and value > 0:
            return value
    return DEFAULT_CONTEXT


def link_weights(source: Path, target: Path) -> None:
    """Hard link, or a symbolic one across file systems: then the source directory has to stay."""
    try:
        os.link(source, target)
    except OSError:
        target.symlink_to(source)
