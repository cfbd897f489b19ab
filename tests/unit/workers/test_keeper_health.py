"""A sampler that says it is dead is replaced at once; one that is silent gets the benefit of the doubt."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from app.core.settings import Settings
from workers.sampler import keeper as keeping
from workers.sampler.keeper import SILENCE_S, Keeper
from workers.sampler.kept import Kept, Place


class Client:
    def __init__(self, status: int | None) -> None:
        self.status = status

    async def health(self) -> bool:
        return self.status == 200

    async def engine_is_dead(self) -> bool:
        return self.status is not None and self.status >= 500


@pytest.mark.parametrize(
    ("status", "silent_s", "replaced"),
    [(503, 0.0, True), (None, 1.0, False), (None, SILENCE_S + 1, True)],
)
async def test_what_a_sampler_says_of_itself_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int | None, silent_s: float, replaced: bool
) -> None:
    keeper = Keeper(Settings(data_dir=tmp_path))
    child: Any = object()
    place = Place("m", "0")
    kept = Kept(place, "http://127.0.0.1:1", child, None, {}, 1, tmp_path / "log", 0, 0.0, 0.0)
    kept.row_id, kept.healthy = "row", time.monotonic() - silent_s
    keeper.kept[place] = kept
    failures: list[str] = []

    async def failed(kept: Kept, reason: str) -> None:
        failures.append(reason)

    async def beat() -> None:
        return None

    monkeypatch.setattr(keeper, "failed", failed)
    monkeypatch.setattr(keeper.presence, "beat", beat)
    monkeypatch.setattr(keeping, "SamplerClient", lambda http, url: Client(status))

    await keeper.beat()

    assert bool(failures) == replaced
    await keeper.http.aclose()
    await keeper.database.close()
