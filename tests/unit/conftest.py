"""For the rooms that speak to users' servers: a scripted endpoint, and a guarded client that may reach the loopback.

Does not cover: the guard itself, whose tests make clients of their own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from app.net.clients import EgressPolicy, HttpClient, guarded_client
from tests.unit.net.user_endpoint import UserEndpoint, serving


@pytest.fixture
async def endpoint() -> AsyncIterator[UserEndpoint]:
    async with serving() as made:
        yield made


@pytest.fixture
async def http() -> AsyncIterator[HttpClient]:
    async with guarded_client(EgressPolicy.parse("127.0.0.0/8:*"), timeout_s=10) as made:
        yield made
