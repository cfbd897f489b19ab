"""A duty goes on while its database is away, and ends in order when told to."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy.exc import OperationalError

from workers.daemon import Daemon


class Duty(Daemon):
    poll_s = 0.001

    def __init__(self, faults: list[Exception | None]) -> None:
        super().__init__()
        self.faults = faults
        self.passes = 0
        self.ended = False

    async def tick(self) -> None:
        fault = self.faults[self.passes] if self.passes < len(self.faults) else None
        self.passes += 1
        if fault is not None:
            raise fault
        if self.passes > len(self.faults):
            self.stopping.set()

    async def shut_down(self) -> None:
        self.ended = True


async def test_a_database_that_is_away_for_a_moment_does_not_end_it() -> None:
    duty = Duty([OperationalError("select 1", {}, Exception("locked")), None])
    await asyncio.wait_for(duty.run(), 5)
    assert (duty.passes, duty.ended) == (3, True)


async def test_a_bug_ends_it_but_in_order() -> None:
    duty = Duty([ValueError("bug")])
    with pytest.raises(ValueError, match="bug"):
        await duty.run()
    assert duty.ended
