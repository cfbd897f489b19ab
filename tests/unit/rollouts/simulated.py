"""A sampler and a tool with limits of their own, and traffic on both, for tests in virtual time.

Does not cover: HTTP and real engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from app.net.exchange import Attempted
from app.samplers.metrics import SamplerLoad
from workers.rollouts.congestion import Congestion

ROOMY = SamplerLoad(running=4, waiting=0, kv_usage=0.1, preemptions=0, generation_tokens=0)


@dataclass
class Engine:
    """Serves `rows` turns at once, the rest wait; each takes a second and one share of `kv`."""

    rows: int
    kv: int
    running: int = 0
    waiting: int = 0
    served: int = 0
    row: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self.row = asyncio.Semaphore(self.rows)

    async def turn(self) -> None:
        self.waiting += 1
        async with self.row:
            self.waiting -= 1
            self.running += 1
            try:
                await asyncio.sleep(1.0)
            finally:
                self.running -= 1
            self.served += 1

    async def loads(self) -> list[SamplerLoad]:
        return [SamplerLoad(self.running, self.waiting, self.running / self.kv, 0, self.served)]


@dataclass
class Tool:
    """Refuses the call that would be one more than `most`; answers after `seconds`."""

    most: int
    seconds: float = 1.0
    at_once: int = 0
    peak: int = 0
    answered: int = 0
    refused: int = 0
    retry_after_s: float | None = None

    async def call(self, watch: Callable[[Attempted], None]) -> None:
        while True:
            self.at_once += 1
            self.peak = max(self.peak, self.at_once)
            try:
                if self.at_once > self.most:
                    self.refused += 1
                    watch(Attempted(429, 0.0, self.retry_after_s))
                else:
                    await asyncio.sleep(self.seconds)
                    self.answered += 1
                    watch(Attempted(200, self.seconds))
                    return
            finally:
                self.at_once -= 1
            await asyncio.sleep(0.25)


Life = Callable[[], Awaitable[None]]


async def traffic(congestion: Congestion, lives: Sequence[Life], seconds: float, loads: object = None) -> list[int]:
    """Endless trajectories behind the admission; the limit as it was each second."""

    async def worker(life: Life) -> None:
        while True:
            async with congestion.slot((0,)):
                await life()

    tasks = [asyncio.create_task(worker(life)) for life in lives]
    if loads is not None:
        tasks.append(asyncio.create_task(congestion.poll(loads)))  # type: ignore[arg-type]
    limits = []
    for _ in range(int(seconds)):
        await asyncio.sleep(1.0)
        limits.append(congestion.limit)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert congestion.in_flight == congestion.waiting == 0
    return limits
