"""`GET /healthz`: can this service take a job now? `GET /livez`: does this process answer at all?

Does not cover: whether a sampler runs (chat starts one on demand) nor the deeper look of `hone doctor`.
"""

from __future__ import annotations

from functools import cache

from alembic.script import ScriptDirectory
from fastapi import APIRouter
from fastapi.responses import JSONResponse
from sqlalchemy import func, select, text
from sqlalchemy.exc import SQLAlchemyError

from app.db import migrate
from app.db.engine import Database, now
from app.db.tables import Worker
from app.web.deps import DatabaseDep

RUNNER_SILENCE_S = 30.0

router = APIRouter(include_in_schema=False)


@router.get("/livez")
async def livez() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/healthz")
async def healthz(database: DatabaseDep) -> JSONResponse:
    missing = await problems(database)
    if missing:
        return JSONResponse({"status": "unavailable", "missing": missing}, 503, {"retry-after": "2"})
    return JSONResponse({"status": "ok", "missing": {}})


@cache
def newest_revision(url: str) -> str | None:
    """The newest revision that this code knows; reading it imports every migration, so once."""
    return ScriptDirectory.from_config(migrate.config(url)).get_current_head()


async def problems(database: Database) -> dict[str, str]:
    """What keeps a job from being taken, by name; empty when nothing does."""
    head = newest_revision(database.url)
    try:
        async with database.read() as session:
            revision = await session.scalar(text("SELECT version_num FROM alembic_version"))
            if revision != head:
                return {"database": f"at revision {revision}, the code needs {head}: restart `hone up`, it migrates"}
            silence = await session.scalar(select(now() - func.max(Worker.heartbeat)).where(Worker.kind == "runner"))
    except (SQLAlchemyError, OSError) as error:
        return {"database": f"does not answer or was never migrated ({type(error).__name__})"}
    if silence is None:
        return {"runner": "none has started yet"}
    if silence > RUNNER_SILENCE_S:
        return {"runner": f"silent for {silence:.0f} s: see logs/runner.log in the data directory"}
    return {}
