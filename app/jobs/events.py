"""Append to a job's event log, in the caller's transaction, so that an event exists exactly when its cause does.

Does not cover: listing events (`app.jobs.repository`).
"""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.ids import new_id
from app.db.engine import now
from app.db.tables import Event

Level = Literal["info", "warn", "error"]


async def append(
    session: AsyncSession,
    *,
    project_id: str,
    job_id: str,
    message: str,
    level: Level = "info",
    type: Literal["message", "metrics"] = "message",
    data: dict[str, Any] | None = None,
) -> None:
    """One `fine_tuning.job.event`. Messages that scripts match on are in the contract §8.2."""
    await session.execute(
        insert(Event).values(
            id=new_id("ftevent-"),
            project_id=project_id,
            job_id=job_id,
            created_at=now(),
            level=level,
            type=type,
            message=message,
            data=data,
        )
    )
