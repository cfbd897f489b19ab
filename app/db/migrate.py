"""Bring a database to the newest revision; called by `hone up` and by the tests, so both run the real migrations.

Does not cover: writing a revision (`make migration m="…"`).
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config

import migrations


def config(url: str) -> Config:
    """Alembic's configuration for `url` (either driver name is fine)."""
    made = Config()
    made.set_main_option("script_location", str(Path(migrations.__file__).parent))
    made.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    made.set_main_option("file_template", "%%(year)d-%%(month).2d-%%(day).2d-%%(hour).2d%%(minute).2d_%%(slug)s")
    made.set_main_option("path_separator", "os")
    return made


def upgrade(url: str, revision: str = "head") -> None:
    """Blocking; raises SQLAlchemy's errors when the database cannot be reached."""
    command.upgrade(config(url), revision)


def downgrade(url: str, revision: str) -> None:
    command.downgrade(config(url), revision)
