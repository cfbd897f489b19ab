"""All SQL about files.

Does not cover: the bytes (`storage`). An expired file is already gone for every reader; `expired` names what to remove.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sqlalchemy import ColumnElement, delete, func, or_, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from app.core.states import TERMINAL
from app.db.engine import now
from app.db.tables import File, Job

Order = Literal["asc", "desc"]


def _alive() -> ColumnElement[bool]:
    return or_(File.expires_at.is_(None), File.expires_at > now())


def _needs(file_id: ColumnElement[str] | InstrumentedAttribute[str] | str) -> ColumnElement[bool]:
    """True for a job that is not finished and trains or validates on the file."""
    return or_(Job.training_file == file_id, Job.validation_file == file_id) & Job.status.not_in(
        [str(status) for status in TERMINAL]
    )


async def get(session: AsyncSession, project_id: str, file_id: str) -> File | None:
    found: File | None = await session.scalar(
        select(File).where(File.id == file_id, File.project_id == project_id, _alive())
    )
    return found


async def page(
    session: AsyncSession, project_id: str, *, purpose: str | None, after: File | None, order: Order, limit: int
) -> Sequence[File]:
    """Up to `limit + 1` rows by creation time, ties by id."""
    query = select(File).where(File.project_id == project_id, _alive())
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    place = tuple_(File.created_at, File.id)
    if after is not None:
        cursor = tuple_(after.created_at, after.id)
        query = query.where(place < cursor if order == "desc" else place > cursor)
    columns = (File.created_at, File.id)
    query = query.order_by(*(column.desc() if order == "desc" else column.asc() for column in columns))
    return (await session.scalars(query.limit(limit + 1))).all()


async def total_bytes(session: AsyncSession, project_id: str) -> int:
    return (
        await session.scalar(select(func.coalesce(func.sum(File.bytes), 0)).where(File.project_id == project_id)) or 0
    )


async def digests(session: AsyncSession, ids: Sequence[str]) -> dict[str, str]:
    """sha256 by id, of those that exist, whoever owns them."""
    rows = await session.execute(select(File.id, File.sha256).where(File.id.in_(ids)))
    return {file_id: sha256 for file_id, sha256 in rows}


async def open_jobs(session: AsyncSession, file_id: str) -> Sequence[str]:
    """Jobs that are not finished and need this file."""
    return (await session.scalars(select(Job.id).where(_needs(file_id)))).all()


async def remove(session: AsyncSession, file_id: str) -> None:
    await session.execute(delete(File).where(File.id == file_id))


async def remove_expired(session: AsyncSession, limit: int = 100) -> Sequence[str]:
    """Delete the rows of expired files that no open job needs; returns their ids, whose bytes may go."""
    ids = (
        await session.scalars(
            select(File.id)
            .where(File.expires_at <= now(), ~select(Job.id).where(_needs(File.id)).exists())
            .limit(limit)
        )
    ).all()
    if ids:
        await session.execute(delete(File).where(File.id.in_(ids)))
    return ids
