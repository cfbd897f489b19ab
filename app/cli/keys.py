"""`hone keys`: make, list and revoke API keys.

Does not cover: what a key is (`app.security.api_keys`). Works on the database, with or without a running service.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import typer

from app.cli.installation import Data, Json, load_settings, prepare_database

commands = typer.Typer(help="API keys.", no_args_is_help=True)
T = TypeVar("T")


@commands.command("create")
def create(
    name: Annotated[str, typer.Argument(help="What the key is for; shown in the list.")],
    project: Annotated[
        str, typer.Option(help="The project whose files, jobs and models the key sees.")
    ] = "proj_default",
    data: Data = None,
) -> None:
    """Make a key and print it alone on standard output. It is shown this once."""
    key = _with_ring(data, lambda ring, session: ring.create(session, name, project), write=True)
    sys.stdout.write(f"{key}\n")
    sys.stdout.flush()
    sys.stderr.write(f"A key for {project}. It cannot be shown again; `hone keys list` knows its end.\n")


@commands.command("list")
def list_keys(data: Data = None, as_json: Json = False) -> None:
    """All keys, revoked ones too; never the keys themselves."""
    rows = [
        {
            "id": row.id,
            "name": row.name,
            "project": row.project_id,
            "key": row.hint,
            "created": _day(row.created_at),
            "revoked": _day(row.revoked_at),
        }
        for row in _with_ring(data, lambda ring, session: ring.list(session), write=False)
    ]
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column("id", no_wrap=True, min_width=28), "name", "project", "key", "created", "revoked", box=None)
    for row in rows:
        table.add_row(*(value or "" for value in row.values()))
    Console().print(table if rows else "No key yet: hone keys create NAME")


@commands.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As in `hone keys list`.")], data: Data = None
) -> None:
    """Refuse a key from the next request on."""
    _with_ring(data, lambda ring, session: ring.revoke(session, key_id), write=True)
    sys.stderr.write(f"{key_id} is revoked.\n")


def _with_ring(data: Any, work: Callable[[Any, Any], Awaitable[T]], *, write: bool) -> T:
    from app.db.engine import Database
    from app.security.api_keys import KeyRing, load_peppers

    settings = load_settings(data)
    prepare_database(settings)

    async def run() -> T:
        database = Database(settings.database)
        try:
            async with database.begin() if write else database.read() as session:
                return await work(KeyRing(load_peppers(settings)), session)
        finally:
            await database.close()

    return asyncio.run(run())


def _day(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
