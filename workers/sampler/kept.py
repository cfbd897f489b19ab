"""The samplers a keeper answers for: one entry for each place (a server of ours, or a URL) of each base model.

Does not cover: what is done with them (`workers.sampler.keeper`).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from app.net.endpoint import show_url
from workers.process import Child
from workers.sampler.admission import Admitted

BACK_OFF_S = (0.0, 1.0, 3.0, 10.0, 30.0)


class Place(NamedTuple):
    """`where`: the number of a server of ours, or the URL of one that runs elsewhere."""

    base_model: str
    where: str


@dataclass
class Kept:
    """A sampler this keeper answers for. Times are monotonic."""

    place: Place
    url: str
    child: Child | None  # None: it runs elsewhere
    dtype: str | None  # what it was started with
    facts: dict[str, object]  # likewise, for its row: highest LoRA rank, whether it takes seeds
    context: int
    log: Path
    log_from: int  # bytes of the log that were there before
    started: float
    wanted: float  # last time somebody wanted it
    admission: asyncio.Task[Admitted] | None = None  # since it is healthy
    row_id: str | None = None  # once it is admitted
    healthy: float = 0.0  # last time it answered /health

    @property
    def address(self) -> str:
        """Its URL for people: without credentials."""
        return show_url(self.url)

    @property
    def base_model(self) -> str:
        return self.place.base_model


@dataclass
class Failures:
    """How often each place failed in a row, why, and when it may be tried again."""

    count: dict[Place, int] = field(default_factory=dict)
    reasons: dict[Place, str] = field(default_factory=dict)
    _retry_at: dict[Place, float] = field(default_factory=dict)

    def add(self, place: Place, reason: str) -> int:
        count = self.count[place] = self.count.get(place, 0) + 1
        self.reasons[place] = reason
        self._retry_at[place] = time.monotonic() + BACK_OFF_S[min(count, len(BACK_OFF_S)) - 1]
        return count

    def rest(self, place: Place, reason: str) -> None:
        """No fault of the place: look again after the longest pause."""
        self.reasons[place] = reason
        self._retry_at[place] = time.monotonic() + BACK_OFF_S[-1]

    def may_start(self, place: Place) -> bool:
        return time.monotonic() >= self._retry_at.get(place, 0.0)

    def clear(self, place: Place) -> None:
        for by_place in (self.count, self.reasons, self._retry_at):
            by_place.pop(place, None)

    def of(self, base_model: str) -> str:
        """All reasons that stand for one base model, in one line."""
        return "; ".join(reason for place, reason in self.reasons.items() if place.base_model == base_model)
