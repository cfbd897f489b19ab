"""`hone webhooks`: which URLs hear how a project's jobs ended.

Does not cover: sending (`app.webhooks.delivery`). Works on the database, with or without a running service.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from app.cli.failure import CommandFailed
from app.cli.installation import Data, Json, in_session, load_settings, prepare_database

if TYPE_CHECKING:
    from app.webhooks.service import EndpointView

commands = typer.Typer(help="URLs that are told how jobs ended.", no_args_is_help=True)
T = TypeVar("T")
Project = Annotated[str, typer.Option(help="The project whose jobs it is about.")]
EndpointId = Annotated[str, typer.Argument(metavar="ID", help="As in `hone webhooks list`.")]
DEFAULT = "proj_default"


@commands.command("add")
def add(
    url: Annotated[str, typer.Argument(help="Where events are posted.")],
    events: Annotated[
        str, typer.Option(help="Comma-separated: succeeded, failed, cancelled, paused. Default: all.")
    ] = "",
    project: Project = DEFAULT,
    data: Data = None,
) -> None:
    """Send a project's events to a URL; the signing secret stands alone on standard output, this once."""
    from app.webhooks import service
    from app.webhooks.schemas import PREFIX

    names = [name.strip().removeprefix(PREFIX) for name in events.split(",")]
    types = [f"{PREFIX}{name}" for name in names if name]
    issued = _with_vault(data, lambda session, vault: service.add(session, vault, project, url, types))
    sys.stdout.write(f"{issued.secret}\n")
    sys.stdout.flush()
    sys.stderr.write(f"{issued.endpoint_id} in {project}. Its secret cannot be shown again, only rotated.\n")


@commands.command("list")
def list_endpoints(project: Project = DEFAULT, data: Data = None, as_json: Json = False) -> None:
    """A project's endpoints and what each has not got; never a secret."""
    from app.webhooks import service

    views = _with_vault(data, lambda session, vault: service.list_endpoints(session, project))
    rows = [_row(view) for view in views]
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column("id", no_wrap=True, min_width=27), "url", "events", "state", "waiting", "given up", box=None)
    for row in rows:
        events = " ".join(type_.rpartition(".")[2] for type_ in row["events"])
        table.add_row(row["id"], row["url"], events, row["state"], str(row["waiting"]), str(row["given_up"]))
    Console().print(table if rows else f"No endpoint in {project} yet: hone webhooks add URL")


@commands.command("rotate")
def rotate(endpoint_id: EndpointId, project: Project = DEFAULT, data: Data = None) -> None:
    """Print a new secret. For 24 hours requests carry the signatures of both."""
    from app.webhooks import service

    issued = _with_vault(data, lambda session, vault: service.rotate(session, vault, project, endpoint_id))
    sys.stdout.write(f"{issued.secret}\n")
    sys.stdout.flush()
    sys.stderr.write("The secret before it signs as well for 24 hours; put the new one in place by then.\n")


@commands.command("remove")
def remove(endpoint_id: EndpointId, project: Project = DEFAULT, data: Data = None) -> None:
    """Send nothing more there; what waits is dropped."""
    from app.webhooks import service

    _with_vault(data, lambda session, vault: service.remove(session, project, endpoint_id))
    sys.stderr.write(f"{endpoint_id} is removed.\n")


def _row(view: EndpointView) -> dict[str, Any]:
    from app.net.endpoint import show_url

    endpoint = view.endpoint
    return {
        "id": endpoint.id,
        "project": endpoint.project_id,
        "url": show_url(endpoint.url),  # a query may hold a token
        "events": endpoint.events,
        "state": "on" if endpoint.disabled_at is None else f"off: {endpoint.disabled_reason}",
        "waiting": view.backlog.waiting,
        "given_up": view.backlog.given_up,
    }


def _with_vault(data: Any, work: Callable[[Any, Any], Awaitable[T]]) -> T:
    from app.security.vault import VaultError, load_vault

    settings = load_settings(data)
    prepare_database(settings)
    key = settings.secret_key.get_secret_value() if settings.secret_key else None
    try:
        vault = load_vault(key, settings.root)
    except VaultError as error:
        raise CommandFailed(str(error)) from None
    return in_session(settings, lambda session: work(session, vault), write=True)
