"""A database for the sampler's row; the engines are started by the tests."""

from __future__ import annotations

from tests.db.conftest import database, settings

__all__ = ["database", "settings"]
