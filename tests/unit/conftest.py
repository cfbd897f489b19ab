"""For several rooms: a migrated database, a scripted endpoint, and a guarded client that may reach the loopback.

Does not cover: the guard itself, whose tests make clients of their own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.db import migrate
from app.db.engine import Database
from app.net.clients import EgressPolicy, HttpClient, guarded_client
from tests.unit.net.user_endpoint import UserEndpoint, serving


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    url = f"sqlite+aiosqlite:///{tmp_path / 'hone.db'}"
    migrate.upgrade(url)
    made = Database(url)
    yield made
    await made.close()


@pytest.fixture
async def endpoint() -> AsyncIterator[UserEndpoint]:
    async with serving() as made:
        yield made


@pytest.fixture
async def http() -> AsyncIterator[HttpClient]:
    async with guarded_client(EgressPolicy.parse("127.0.0.0/8:*"), timeout_s=10) as made:
        yield made
