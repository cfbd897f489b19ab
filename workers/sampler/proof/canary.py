"""The canary at one sampler: its scores under a name, and whether the engine did nothing else meanwhile.

Does not cover: what the scores mean (`gates`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from app.samplers.errors import SamplerError
from app.samplers.metrics import LoadUnreadable, SamplerLoad, parse_load
from workers.sampler.proof.gates import Scores
from workers.sampler.station import Station


@dataclass
class Quiet:
    """Whether scores taken inside are a fingerprint; `why_not` is final only after the context ended."""

    why_not: str | None = None
    requests: int = 0  # ours

    @property
    def held(self) -> bool:
        return self.why_not is None


class Canary:
    """Fixed sequences of token ids, scored one after the other: in a batch the last bits would move."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self._sequences = sequences

    async def score(self, station: Station, name: str, quiet: Quiet) -> Scores:
        """Teacher-forced log-probs under `name`. Raises the errors of `app.samplers.errors`."""
        quiet.requests += len(self._sequences)
        return [await station.client.score(name, ids) for ids in self._sequences]

    @asynccontextmanager
    async def alone(self, station: Station) -> AsyncIterator[Quiet]:
        """Keep this run's turns out for a moment; the engine's own counters tell whether others came (chat, a job)."""
        quiet = Quiet()
        async with station.quiet() as empty:
            before = await _load(station) if empty else None
            if not empty:
                quiet.why_not = f"{station.in_flight} turns were in flight"
            elif before is None:
                quiet.why_not = "the sampler does not say how busy it is"
            elif before.running or before.waiting:
                quiet.why_not = f"others had {before.running + before.waiting} requests in flight"
            yield quiet
            if quiet.why_not is None and before is not None:
                after = await _load(station)
                # Each of our requests samples one token; more were another's.
                if after is None or after.generation_tokens - before.generation_tokens > quiet.requests:
                    quiet.why_not = "another request came between"


async def _load(station: Station) -> SamplerLoad | None:
    try:
        return parse_load(await station.client.metrics())
    except (SamplerError, LoadUnreadable):  # no fingerprint then, and the reason says so
        return None
