"""The migrated database of `tests/db`, and a policy with samplers in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from app.core.settings import Settings
from app.db.engine import Database
from tests.db.conftest import database, seed, settings
from tests.unit.workers.fake_engine import FakeSamplers
from tests.unit.workers.serving import HOLDER
from workers.sampler import policy as policy_module
from workers.sampler.policy import ServedPolicy

__all__ = ["database", "seed", "settings"]


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_module, "RETRY_PAUSE_S", 0.01)


@pytest.fixture
async def samplers(database: Database, settings: Settings) -> AsyncIterator[FakeSamplers]:
    made = FakeSamplers(database, settings)
    yield made
    await made.close()


@pytest.fixture
def policy(database: Database, samplers: FakeSamplers) -> ServedPolicy:
    return ServedPolicy(samplers, database, "tiny", HOLDER)
