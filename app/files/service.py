"""Files: receive, register, find, list, delete.

Does not cover: reading rows for a job (`app.files.jsonl` gives them, `app.jobs` judges them).
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import BinaryIO

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.errors import InvalidRequest, NotFound, PayloadTooLarge, ServiceError, Unavailable
from app.core.ids import new_id
from app.core.paging import Page
from app.db.engine import Database, now
from app.db.tables import File
from app.files import jsonl, repository
from app.files.multipart import OVERHEAD_BYTES, receive_form
from app.files.repository import Order
from app.files.storage import Incoming, Shelf, Storage, Stored, TooLarge
from app.storage.errors import ObjectDamaged, ObjectMissing, StorageUnavailable
from app.storage.thread import in_thread

log = logging.getLogger(__name__)

UPLOAD_PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
RESULT_PURPOSE = "fine-tune-results"
PROJECT_QUOTA_BYTES = 100 * 1024**3
EXPIRES_S = range(3600, 2_592_000 + 1)


class FileDamaged(ServiceError):
    """What is stored is not what was uploaded: an operator's matter, no retry mends it."""

    default_code = "file_damaged"


@dataclass(frozen=True)
class Received:
    """A file whose bytes are safe under `id`; it does not exist for anybody until `register`."""

    id: str
    stored: Stored
    filename: str
    purpose: str
    expires_s: int | None
    problem: str | None


@asynccontextmanager
async def receiving(
    storage: Storage,
    database: Database,
    chunks: AsyncIterable[bytes],
    content_type: str,
    declared_bytes: int | None,
    limit: int,
) -> AsyncIterator[Received]:
    """Stream an upload to storage and check it; if the block fails, bytes that no row names are removed again.

    Raises StorageUnavailable, and the errors of a request.
    """
    if declared_bytes is not None and declared_bytes > limit + OVERHEAD_BYTES:
        raise _too_large(limit)
    with storage.receive(limit) as draft:
        try:
            form = await receive_form(chunks, content_type, draft)
            stored = await asyncio.to_thread(draft.finish)
        except TooLarge:
            raise _too_large(limit) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise Unavailable("The server has no space left for files.", retry_after_s=60) from error
        purpose = _purpose(form.fields)
        expires_s = _expires(form.fields)
        problem = await asyncio.to_thread(_check, draft) if purpose == "fine-tune" else None
        file_id = new_id("file-")
        await in_thread(storage.publish, draft, file_id)
    try:
        yield Received(file_id, stored, form.filename or "", purpose, expires_s, problem)
    except BaseException:
        if not await _is_known(database, file_id):
            await remove_bytes(storage, [file_id])
        raise


async def _is_known(database: Database, file_id: str) -> bool:
    """A commit may be done and yet be reported as failed. True, too, where that cannot be told."""
    try:
        async with database.read() as session:
            return await session.get(File, file_id) is not None
    except SQLAlchemyError as error:
        log.warning("the bytes of %s may stay behind: %s", file_id, error)
        return True


async def remove_bytes(storage: Storage, ids: Iterable[str]) -> None:
    """Of files that no row names any more. Bytes that cannot be removed now are logged: nobody can reach them."""
    for file_id in ids:
        try:
            await in_thread(storage.delete, file_id)
        except StorageUnavailable as error:
            log.warning("the bytes of %s stay behind: %s", file_id, error)


async def content(storage: Storage, row: File) -> BinaryIO:
    """The file's bytes, every one as uploaded. Raises NotFound, FileDamaged, StorageUnavailable."""
    try:
        return await in_thread(storage.open, row.id, row.sha256)
    except ObjectMissing:
        raise NotFound(f"The content of {row.id} is gone from the server's storage.", param="id") from None
    except ObjectDamaged as error:
        log.error("file %s is not served: %s", row.id, error)
        raise FileDamaged(
            f"The stored content of {row.id} is not what was uploaded and is not served; upload it again.",
            param="id",
        ) from error


async def shelf(session: AsyncSession, storage: Storage, ids: Iterable[str]) -> Shelf:
    """These files, to be read in a thread."""
    return Shelf(storage, await repository.digests(session, list(ids)))


async def require_room(session: AsyncSession, project_id: str, more_bytes: int) -> None:
    """Raises InvalidRequest above the project's quota. Before an upload, too: its bytes lie on disk while it lasts."""
    used = await repository.total_bytes(session, project_id)
    if used + more_bytes > PROJECT_QUOTA_BYTES:
        raise InvalidRequest(
            f"The project's files would exceed {PROJECT_QUOTA_BYTES // 1024**3} GB; delete some first.",
            param="file",
            code="quota_exceeded",
        )


async def register(session: AsyncSession, project_id: str, received: Received) -> File:
    """Make a received file known. Raises InvalidRequest above the project's quota."""
    await require_room(session, project_id, received.stored.bytes)
    return await _add(
        session,
        project_id,
        received.id,
        received.stored,
        filename=received.filename,
        purpose=received.purpose,
        expires_s=received.expires_s,
        problem=received.problem,
    )


async def add_produced(
    session: AsyncSession,
    project_id: str,
    file_id: str,
    stored: Stored,
    *,
    filename: str,
    purpose: str = RESULT_PURPOSE,
) -> File:
    """Make a file known that the service wrote itself with `Storage.put`."""
    return await _add(session, project_id, file_id, stored, filename=filename, purpose=purpose)


async def find(session: AsyncSession, project_id: str, file_id: str, *, param: str = "id") -> File:
    """Raises NotFound for an unknown, foreign or expired file alike."""
    row = await repository.get(session, project_id, file_id)
    if row is None:
        raise NotFound(f"No such File object: {file_id}", param=param)
    return row


async def listed(
    session: AsyncSession, project_id: str, *, purpose: str | None, after: str | None, order: Order, limit: int
) -> Page[File]:
    """Raises InvalidRequest when `after` is not a file of this project."""
    cursor = None
    if after is not None:
        cursor = await repository.get(session, project_id, after)
        if cursor is None:
            raise InvalidRequest(f"No such File object: {after}", param="after")
    rows = await repository.page(session, project_id, purpose=purpose, after=cursor, order=order, limit=limit)
    return Page.of(rows, limit)


async def delete(session: AsyncSession, project_id: str, file_id: str) -> None:
    """Forget the file; the caller removes its bytes after the commit. Raises InvalidRequest while a job needs it."""
    await find(session, project_id, file_id)
    jobs = await repository.open_jobs(session, file_id)
    if jobs:
        raise InvalidRequest(
            f"File {file_id} is needed by {', '.join(jobs[:3])}; cancel it or wait for its end.",
            param="id",
            code="file_in_use",
        )
    await repository.remove(session, file_id)


async def _add(
    session: AsyncSession,
    project_id: str,
    file_id: str,
    stored: Stored,
    *,
    filename: str,
    purpose: str,
    expires_s: int | None = None,
    problem: str | None = None,
) -> File:
    created_at = float((await session.execute(select(now()))).scalar_one())
    row = File(
        id=file_id,
        project_id=project_id,
        filename=filename,
        purpose=purpose,
        bytes=stored.bytes,
        sha256=stored.sha256,
        status="processed" if problem is None else "error",
        status_details=problem,
        created_at=created_at,
        expires_at=None if expires_s is None else created_at + expires_s,
    )
    session.add(row)
    await session.flush()
    return row


def _check(draft: Incoming) -> str | None:
    with draft.path.open("rb") as file:
        return jsonl.check(file).problem()


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"The file is larger than {limit / 1024**2:g} MB, the limit of this server.",
        param="file",
        code="file_too_large",
    )


def _purpose(fields: Mapping[str, str]) -> str:
    purpose = fields.get("purpose")
    if not purpose:
        raise InvalidRequest(
            "Missing required parameter: 'purpose'.", param="purpose", code="missing_required_parameter"
        )
    if purpose not in UPLOAD_PURPOSES:
        known = ", ".join(f"'{name}'" for name in UPLOAD_PURPOSES)
        raise InvalidRequest(f"Invalid value: '{purpose}'. Supported values are: {known}.", param="purpose")
    return purpose


def _expires(fields: Mapping[str, str]) -> int | None:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest("The only anchor is 'created_at'.", param="expires_after.anchor")
    whole = seconds is not None and seconds.isdecimal() and seconds.isascii() and len(seconds) <= 12
    if seconds is None or not whole or int(seconds) not in EXPIRES_S:
        raise InvalidRequest(
            f"A whole number from {EXPIRES_S.start} to {EXPIRES_S.stop - 1} is needed.", param="expires_after.seconds"
        )
    return int(seconds)
