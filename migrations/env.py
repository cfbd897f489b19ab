"""Alembic's entry: one tree for SQLite (batch mode) and PostgreSQL, run by `app.db.migrate`.

Does not cover: offline SQL scripts; the service always migrates a live database.
"""

from __future__ import annotations

from alembic import context

from app.db.engine import create_sync
from app.db.tables import Base


def run() -> None:
    engine = create_sync(context.config.get_main_option("sqlalchemy.url") or "")
    with engine.begin() as connection:
        context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True, compare_type=True)
        context.run_migrations()
    engine.dispose()


run()
