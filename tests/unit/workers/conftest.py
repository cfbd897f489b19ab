"""The migrated database of `tests/db`."""

from tests.db.conftest import database, seed, settings

__all__ = ["database", "seed", "settings"]
