"""Alembic's entry: one tree for SQLite (batch mode) and PostgreSQL, run by `app.db.migrate`.

Does not cover: offline SQL scripts; the service always migrates a live database.
"""

from __future__ import annotations

from alembic import context
from sqlalchemy import text

from app.db.engine import create_sync
from app.db.tables import Base


def run() -> None:
    engine = create_sync(context.config.get_main_option("sqlalchemy.url") or "")
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":  # processes that start together: one migrates, the others wait
            connection.execute(text("SET LOCAL lock_timeout = '10min'"))
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('hone migrations'))"))
        context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True, compare_type=True)
        context.run_migrations()
    engine.dispose()


run()
