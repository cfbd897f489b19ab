"""What every command starts from: the settings in force, and a database that is there and up to date.

Does not cover: starting services (`app.cli.up`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from app.cli.failure import USAGE, CommandFailed

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from app.core.settings import Settings

T = TypeVar("T")
Data = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="DIR", help="Data directory; default: $HONE_DATA_DIR, else ./data.", file_okay=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def load_settings(data: Path | None, **given: Any) -> Settings:
    """Settings from the environment, overridden by what the command line gives (None: not given)."""
    from pydantic import ValidationError

    from app.core.settings import PREFIX, Settings

    values = {name: value for name, value in {"data_dir": data, **given}.items() if value is not None}
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = f"{PREFIX}{'_'.join(str(part) for part in first['loc'])}".upper()
        raise CommandFailed(
            f"{name}: {first['msg']}", fix=f"set {name} to a legal value, or unset it", code=USAGE
        ) from None
    except ValueError as error:
        raise CommandFailed(str(error), fix="make the file readable, or unset the variable", code=USAGE) from None


def prepare_database(settings: Settings) -> None:
    """Create the data directory and bring the database to the newest revision; quick when it is there already."""
    from sqlalchemy.exc import SQLAlchemyError

    from app.db import migrate

    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        settings.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandFailed(
            f"the data directory {settings.root} cannot be made: {error.strerror}", fix="choose another with --data DIR"
        ) from None
    try:
        migrate.upgrade(settings.database)
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise CommandFailed(f"the database could not be prepared: {reason}", fix="see `hone doctor`") from None


def in_session(settings: Settings, work: Callable[[AsyncSession], Awaitable[T]], *, write: bool) -> T:
    """Do `work` in one transaction on a database that is prepared, from outside of any event loop."""
    from app.db.engine import Database

    async def run() -> T:
        database = Database(settings.database)
        try:
            async with database.begin() if write else database.read() as session:
                return await work(session)
        finally:
            await database.close()

    return asyncio.run(run())
