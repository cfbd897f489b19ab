"""`GET /readyz`: may requests be sent to this process? Database, migration and storage, each within a deadline.

Does not cover: whether somebody runs jobs (`/healthz`) and whether the process lives (`/livez`): a load balancer must
keep sending requests while workers are away, because the queue takes jobs all the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from sqlalchemy import literal, select, text
from sqlalchemy.exc import SQLAlchemyError

from app.db.engine import Database
from app.files.storage import Storage
from app.storage.errors import StorageUnavailable
from app.web.health import newest_revision
from app.web.single_flight import SingleFlight

log = logging.getLogger(__name__)

DEADLINE_S = 2.0
Check = Callable[[], Awaitable[str | None]]  # what is wrong, None: nothing

router = APIRouter(include_in_schema=False)


class Readiness:
    """The checks of one process by name."""

    def __init__(self, checks: Mapping[str, Check], deadline_s: float = DEADLINE_S) -> None:
        self._flights = {name: SingleFlight(_settled(check)) for name, check in checks.items()}
        self._deadline_s = deadline_s

    async def missing(self) -> dict[str, str]:
        """Name and fault of each check that fails; all of them run side by side."""
        found = await asyncio.gather(*(self._fault(flight) for flight in self._flights.values()))
        return {name: fault for name, fault in zip(self._flights, found, strict=True) if fault is not None}

    async def _fault(self, flight: SingleFlight[str | None]) -> str | None:
        try:
            return await flight.result(self._deadline_s)
        except TimeoutError:
            return f"no answer within {self._deadline_s:g} s"


def _settled(check: Check) -> Callable[[], Coroutine[Any, Any, str | None]]:
    async def look() -> str | None:
        try:
            return await check()
        except (SQLAlchemyError, OSError) as error:
            return f"does not answer ({type(error).__name__})"

    return look


def of_service(database: Database, storage: Storage) -> Readiness:
    """What this service cannot work without."""

    async def answers() -> None:
        async with database.read() as session:
            await session.scalar(select(literal(1)))

    async def migrated() -> str | None:
        head = newest_revision(database.url)
        async with database.read() as session:
            revision = await session.scalar(text("SELECT version_num FROM alembic_version"))
        return None if revision == head else f"the database is at revision {revision}, the code needs {head}"

    async def writable() -> str | None:
        try:
            await asyncio.to_thread(storage.check)
        except OSError as error:
            return f"cannot be written: {error.strerror or type(error).__name__}"
        except StorageUnavailable as error:
            log.warning("%s", error)
            return "does not answer"
        return None

    return Readiness({"database": answers, "migration": migrated, "storage": writable})


@router.get("/readyz")
async def readyz(request: Request) -> JSONResponse:
    readiness: Readiness = request.app.state.readiness
    missing = await readiness.missing()
    if missing:
        return JSONResponse({"status": "unavailable", "missing": missing}, 503, {"retry-after": "2"})
    return JSONResponse({"status": "ok", "missing": {}})
