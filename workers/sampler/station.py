"""One sampler as a run uses it: which versions it serves with proof, how many turns it is at, and a pause on demand.

Does not cover: which station a turn goes to and what happens when one is lost (`workers.sampler.policy`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from app.samplers.client import SamplerClient
from app.samplers.errors import SamplerUnavailable
from app.samplers.service import LiveSampler

QUIET_WAIT_S = 2.0
QUIET_TURNS = 8  # with more turns than this in flight two seconds would not empty the engine, only starve it


class Station:
    """Turns enter by `slot`; `quiet` keeps new ones out for a moment."""

    def __init__(self, sampler: LiveSampler, client: SamplerClient) -> None:
        self.sampler = sampler
        self.client = client
        self.proved: set[int] = set()  # versions that turns may be asked at
        self.rollouts = 0  # whose turns come here
        self.in_flight = 0
        self._pauses = 0
        self._open = asyncio.Event()
        self._empty = asyncio.Event()
        self._open.set()
        self._empty.set()

    @property
    def load(self) -> tuple[int, int, str]:
        """For `min`: turns now, then rollouts that will come back after their tools."""
        return self.in_flight, self.rollouts, self.sampler.id

    @asynccontextmanager
    async def slot(self, deadline: float) -> AsyncIterator[None]:
        """Around one turn. Waits while somebody keeps the station quiet, until `deadline` (monotonic) at most."""
        if not self._open.is_set():
            try:
                await asyncio.wait_for(self._open.wait(), max(0.0, deadline - time.monotonic()))
            except TimeoutError as error:
                raise SamplerUnavailable(
                    "the sampler was kept quiet until the deadline", url=self.sampler.url
                ) from error
        self.in_flight += 1
        self._empty.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._empty.set()

    @asynccontextmanager
    async def quiet(self) -> AsyncIterator[bool]:
        """Keep new turns out and wait a moment for those in flight; True when none is left. Costs nothing when busy."""
        if self.in_flight > QUIET_TURNS:
            yield False
            return
        self._pauses += 1
        self._open.clear()
        try:
            with suppress(TimeoutError):  # then it is not empty, which is the answer
                await asyncio.wait_for(self._empty.wait(), QUIET_WAIT_S)
            yield self._empty.is_set()
        finally:
            self._pauses -= 1
            if not self._pauses:
                self._open.set()
