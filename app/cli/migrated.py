"""What `hone worker` and `hone sampler` start with: a database that somebody else migrates is waited for.

Does not cover: migrating, which `hone api` and `hone up` do. Without this a worker that is first would start children
that die of missing tables, again and again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from app.cli.failure import UNREACHABLE, USAGE, CommandFailed
from app.cli.together import say

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from app.core.settings import Settings

PATIENCE_S = 300.0  # an API on another host may migrate a large database first
LOOK_S = 1.0


def await_migration(settings: Settings, *, patience_s: float = PATIENCE_S, look_s: float = LOOK_S) -> None:
    """Blocks until the tables are those of this code; one line for each reason to wait. Raises CommandFailed."""
    from alembic.script import ScriptDirectory

    from app.db import migrate
    from app.db.engine import UnsupportedDatabase, create_sync

    try:
        engine = create_sync(settings.database)
    except UnsupportedDatabase as error:
        raise CommandFailed(str(error), code=USAGE) from None
    head = ScriptDirectory.from_config(migrate.config(settings.database)).get_current_head()
    deadline, said = time.monotonic() + patience_s, None
    try:
        while (missing := _missing(engine, head)) is not None:
            if time.monotonic() >= deadline:
                raise CommandFailed(
                    missing, fix="start `hone api` of this version, it migrates; see `hone doctor`", code=UNREACHABLE
                )
            if missing != said:
                say(f"waiting: {missing}")
                said = missing
            time.sleep(look_s)
    finally:
        engine.dispose()


def _missing(engine: Engine, head: str | None) -> str | None:
    """Why nobody could work on this database now; None: nothing."""
    from sqlalchemy import inspect, text
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with engine.connect() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return "the database has no tables yet"
            revision = connection.scalar(text("SELECT version_num FROM alembic_version"))
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        return f"the database does not answer: {reason}"
    return None if revision == head else f"the database is at revision {revision}, this code needs {head}"
