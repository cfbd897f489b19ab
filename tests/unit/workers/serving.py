"""A run's versions and what is asked of its policy, for the tests of `workers.sampler.policy`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from app.db.engine import Database
from app.samplers import repository
from app.samplers.service import Adapter
from tests.unit.workers.fake_engine import FakeEngine, FakeSamplers
from workers.rollouts.setting import TurnRequest

HOLDER = "ftjob-1-a1"


def version(number: int, tmp_path: Path) -> Adapter:
    path = tmp_path / f"{HOLDER}-v{number}"
    path.mkdir(exist_ok=True)
    return Adapter(path.name, str(path))


def asks(number: int = 0, *, seconds: float = 5.0, **values: Any) -> TurnRequest:
    fields: dict[str, Any] = {"max_tokens": 7, "temperature": 1.0, "stop_token_ids": (0,), "stop": ("}",)}
    fields |= {"prompt_ids": (1, 2), "request_id": "t-0", "deadline": time.monotonic() + seconds}
    return TurnRequest(version=number, **{**fields, **values})


async def replace_sampler(database: Database, samplers: FakeSamplers, old: FakeEngine, new: str) -> FakeEngine:
    """What a keeper does when its sampler died: the row goes, a new one comes under another id."""
    old.dead = True
    async with database.begin() as session:
        await repository.remove(session, sampler_id=f"sampler-{old.url.removeprefix('http://')}")
    return await samplers.add(new)
