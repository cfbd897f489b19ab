"""The migrated database of `tests/db`, for what a run writes while it samples."""

from tests.db.conftest import database, seed, settings

__all__ = ["database", "seed", "settings"]
