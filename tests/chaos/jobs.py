"""Jobs of the storm, made as `POST /v1/fine_tuning/jobs` makes them, and what a client does to them later.

Does not cover: HTTP. A ring may be left out: that is an API that died between its commit and the doorbell.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from app.core.errors import ServiceError
from app.core.settings import Settings
from app.core.states import JobStatus
from app.db.engine import Database
from app.db.tables import DEFAULT_PROJECT, Checkpoint, Job
from app.jobs import idempotency, leases, service
from app.jobs.doorbell import make_doorbell
from app.jobs.parse import parse_create
from app.models.catalogue import Catalogue
from app.security.vault import load_vault
from tests.chaos.installation import MODEL
from tests.db.rows import Seed

T = TypeVar("T")
PATIENCE_S = 60.0
TRAIN_ROWS, VALID_ROWS, BATCH = 12, 2, 2
STEPS = TRAIN_ROWS // BATCH
INTERVAL = 2
CHECKPOINTS = tuple(range(INTERVAL, STEPS + 1, INTERVAL))


@dataclass
class Client:
    """What a user's program does: create, pause, resume, cancel, look. Tries again while the database is away."""

    settings: Settings
    answer: str  # what the grader looks for in an answer
    created: list[str] = field(default_factory=list)
    cancelled: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.database = Database(self.settings.database)
        self.bell = make_doorbell(self.settings)
        self.catalogue = Catalogue(self.settings.models_dir)
        self.vault = load_vault(None, self.settings.root)
        self._files: tuple[str, str] | None = None

    async def close(self) -> None:
        await asyncio.to_thread(self.bell.close)
        await self.database.close()

    async def patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return await work()
            except SQLAlchemyError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.3)

    async def create(self, *, ring: bool = True) -> str:
        if self._files is None:
            seed = Seed(self.database, self.settings)
            self._files = await seed.file(_rows(TRAIN_ROWS, 0)), await seed.file(_rows(VALID_ROWS, 100))
        number = len(self.created)
        spec = parse_create(self._body(number, *self._files))
        made = service.draft(spec, self.vault)
        attempt = idempotency.read_headers(DEFAULT_PROJECT, spec.request_hash, f"storm-{number}", None)

        async def insert() -> str:
            async with self.database.begin() as session:
                return (await service.create(session, made, attempt)).id

        job_id = await self.patiently(insert)
        self.created.append(job_id)
        if ring:
            self.bell.ring(job_id, MODEL)
        return job_id

    def _body(self, number: int, train: str, valid: str) -> dict[str, Any]:
        grader = {
            "type": "string_check",
            "name": "said",
            "input": "{{sample.output_text}}",
            "reference": self.answer,
            "operation": "like",
        }
        hyperparameters = {"n_epochs": 1, "batch_size": BATCH, "compute_multiplier": 0.5, "eval_interval": INTERVAL}
        return {
            "model": MODEL,
            "training_file": train,
            "validation_file": valid,
            "seed": number,
            "method": {
                "type": "reinforcement",
                "reinforcement": {"grader": grader, "hyperparameters": hyperparameters},
            },
            "hone": {"max_tokens_per_turn": 8, "max_staleness": number % 2, "on_no_signal": "continue"},
        }

    async def pause(self, job_id: str) -> bool:
        return await self._ask(service.pause, job_id) == JobStatus.PAUSED

    async def resume(self, job_id: str) -> None:
        await self._ask(service.resume, job_id)
        self.bell.ring(job_id, MODEL)

    async def cancel(self, job_id: str) -> bool:
        if await self._ask(service.cancel, job_id) != JobStatus.CANCELLED:
            return False
        self.cancelled.add(job_id)
        return True

    async def _ask(self, what: Callable[..., Awaitable[None]], job_id: str) -> str:
        """The status afterwards: a refusal may be the answer to a request that was sent twice."""

        async def ask() -> None:
            async with self.database.begin() as session:
                await what(session, DEFAULT_PROJECT, job_id)

        with suppress(ServiceError):
            await self.patiently(ask)
        return (await self.statuses())[job_id]

    async def end_lease(self, job_id: str, supervisor: int) -> None:
        owner = leases.owner_name(self.settings.hostname, supervisor)

        async def end() -> None:
            async with self.database.begin() as session:
                await leases.expire(session, job_id, owner)

        await self.patiently(end)

    async def checkpoints(self, job_id: str) -> int:
        async def count() -> int:
            async with self.database.read() as session:
                query = select(func.count()).where(Checkpoint.job_id == job_id)
                return await session.scalar(query) or 0

        return await self.patiently(count)

    async def statuses(self) -> dict[str, str]:
        async def look() -> dict[str, str]:
            async with self.database.read() as session:
                return {job: status for job, status in await session.execute(select(Job.id, Job.status))}

        return await self.patiently(look)


def _rows(number: int, first: int) -> bytes:
    rows = ({"messages": [{"role": "user", "content": f"Say {n}"}]} for n in range(first, first + number))
    return "\n".join(json.dumps(row) for row in rows).encode()
