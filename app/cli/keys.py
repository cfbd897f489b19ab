"""`hone keys`: make, list and revoke API keys; change the key that secrets are encrypted with.

Does not cover: what a key is (`app.security.api_keys`). Works on the database, with or without a running service.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from app.cli.failure import CommandFailed
from app.cli.installation import Data, Json, in_session, load_settings, prepare_database
from app.core.roles import Role

if TYPE_CHECKING:
    from app.core.settings import Settings
    from app.security.rotation import Resealed

commands = typer.Typer(help="API keys.", no_args_is_help=True)
T = TypeVar("T")


@commands.command("create")
def create(
    name: Annotated[str, typer.Argument(help="What the key is for; shown in the list.")],
    project: Annotated[
        str, typer.Option(help="The project whose files, jobs and models the key sees.")
    ] = "proj_default",
    role: Annotated[
        Role, typer.Option(help="read: look. run: also create, change and chat. admin: also administer.")
    ] = Role.RUN,
    data: Data = None,
) -> None:
    """Make a key and print it alone on standard output. It is shown this once."""
    key = _with_ring(data, lambda ring, session: ring.create(session, name, project, role), write=True)
    sys.stdout.write(f"{key}\n")
    sys.stdout.flush()
    sys.stderr.write(
        f"A key for {project} with the role {role}. It cannot be shown again; `hone keys list` knows its end.\n"
    )


@commands.command("list")
def list_keys(data: Data = None, as_json: Json = False) -> None:
    """All keys, revoked ones too; never the keys themselves."""
    rows = [
        {
            "id": row.id,
            "name": row.name,
            "project": row.project_id,
            "role": row.role,
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

    table = Table(
        Column("id", no_wrap=True, min_width=28), "name", "project", "role", "key", "created", "revoked", box=None
    )
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


@commands.command("rotate-secret", hidden=True)  # its earlier name
@commands.command("rotate")
def rotate(data: Data = None) -> None:
    """Encrypt every stored secret with a new key, and drop the old one. Safe to stop, and to run again.

    Nothing has to be restarted. With HONE_SECRET_KEY, first set it to NEW,OLD for every process and restart them.
    """
    from app.security.vault import VaultError

    settings = load_settings(data)
    prepare_database(settings)
    try:
        done = asyncio.run(_rotate(settings))
    except VaultError as error:
        raise CommandFailed(str(error)) from None
    if done.unreadable:
        shown = ", ".join(done.unreadable[:10])
        raise CommandFailed(
            f"{len(done.unreadable)} rows hold secrets that no key here opens: {shown}; the old keys were kept",
            fix="add the key they were sealed with to HONE_SECRET_KEY, or remove those rows; then run this again",
        )
    sys.stderr.write(f"{done.rows} rows were encrypted again.\n")
    if _setting(settings):
        _say_what_remains(data)


def _setting(settings: Settings) -> str:
    """HONE_SECRET_KEY; empty when the key file is in force."""
    return settings.secret_key.get_secret_value() if settings.secret_key is not None else ""


async def _rotate(settings: Settings) -> Resealed:
    """With a key file the rotation is whole; with the setting, the operator changes the keys."""
    from app.db.engine import Database
    from app.security import rotation
    from app.security.vault import load_vault

    database = Database(settings.database)
    try:
        if not _setting(settings):
            least = f"{rotation.SETTLE_S:.0f} s"
            sys.stderr.write(f"This takes at least {least}: requests under way may still use the old key.\n")
            return await rotation.rotate_key_file(database, settings.root)
        vault = load_vault(_setting(settings), settings.root)
        if vault.keys == 1:
            raise CommandFailed(
                "HONE_SECRET_KEY holds one key: there is none to rotate to",
                fix="set HONE_SECRET_KEY=NEW,OLD for every process, restart them, and run this again",
            )
        return await rotation.reseal(database, vault)
    finally:
        await database.close()


def _say_what_remains(data: Any) -> None:
    """API keys cannot be read back, so those made with an older secret need it until they are used once."""
    stale = _with_ring(data, lambda ring, session: ring.stale(session), write=False)
    if stale:
        sys.stderr.write(
            f"Keep the old key in HONE_SECRET_KEY: {len(stale)} API keys need it until their next use "
            f"({', '.join(stale[:10])}). Use or revoke them, then run this again.\n"
        )
    else:
        sys.stderr.write("Now leave the new key alone in HONE_SECRET_KEY, and restart.\n")


def _with_ring(data: Any, work: Callable[[Any, Any], Awaitable[T]], *, write: bool) -> T:
    from app.security.api_keys import KeyRing, load_peppers

    settings = load_settings(data)
    prepare_database(settings)
    return in_session(settings, lambda session: work(KeyRing(load_peppers(settings)), session), write=write)


def _day(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
