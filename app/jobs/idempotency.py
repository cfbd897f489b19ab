"""One request, one job: a create that is sent again finds the job of the first time (contract §1.3).

Does not cover: other routes. The SDK sends a POST up to three times, and adds no `Idempotency-Key` by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.errors import InvalidRequest
from app.db.engine import alone, now
from app.db.tables import IdempotencyKey

ROUTE = "POST /v1/fine_tuning/jobs"
KEPT_S = 24 * 3600.0
RETRY_WINDOW_S = 300.0
MAX_KEY_CHARS = 255
HEADER = "Idempotency-Key"


@dataclass(frozen=True)
class Attempt:
    """How a create arrived: `key` as the caller gave it, `retry` whether the SDK says that it sent this before."""

    project_id: str
    request_hash: str
    key: str | None
    retry: bool


def read_headers(project_id: str, request_hash: str, key: str | None, retry_count: str | None) -> Attempt:
    """From the two request headers. Raises InvalidRequest for a key that is too long."""
    if key is not None and not 0 < len(key) <= MAX_KEY_CHARS:
        raise InvalidRequest(f"{HEADER} must have 1 to {MAX_KEY_CHARS} characters", param=HEADER)
    retry = retry_count is not None and retry_count.isdecimal() and int(retry_count[:9]) > 0
    return Attempt(project_id, request_hash, key, retry)


async def find(session: AsyncSession, attempt: Attempt) -> str | None:
    """The id that this request already made, or None. Raises InvalidRequest if the key stands for another body."""
    mine = select(IdempotencyKey).where(IdempotencyKey.project_id == attempt.project_id, IdempotencyKey.route == ROUTE)
    if attempt.key is not None:
        found = await session.scalar(
            mine.where(IdempotencyKey.key == _given(attempt.key), IdempotencyKey.created_at > now() - KEPT_S)
        )
        if found is not None and found.request_hash != attempt.request_hash:
            raise InvalidRequest(f"{HEADER} was already used with another body; take a new key", param=HEADER)
        return None if found is None else found.resource_id
    # The request before may still be at it: its row is seen once it is done.
    await alone(session, f"create {attempt.project_id} {attempt.request_hash}")
    if not attempt.retry:
        return None
    found = await session.scalar(
        mine.where(
            IdempotencyKey.request_hash == attempt.request_hash,
            IdempotencyKey.created_at > now() - RETRY_WINDOW_S,
        )
        .order_by(IdempotencyKey.created_at.desc())
        .limit(1)
    )
    return None if found is None else found.resource_id


async def remember(session: AsyncSession, attempt: Attempt, resource_id: str) -> bool:
    """Record what this request makes. False: a concurrent request with the same key was faster; `find` has its id."""
    await session.execute(
        delete(IdempotencyKey).where(IdempotencyKey.route == ROUTE, IdempotencyKey.created_at <= now() - KEPT_S)
    )
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    made = await session.scalar(
        insert(IdempotencyKey)
        .values(
            project_id=attempt.project_id,
            route=ROUTE,
            key=f"auto:{resource_id}" if attempt.key is None else _given(attempt.key),
            request_hash=attempt.request_hash,
            resource_id=resource_id,
            created_at=now(),
        )
        .on_conflict_do_nothing(index_elements=["project_id", "route", "key"])
        .returning(IdempotencyKey.id)
    )
    return made is not None


def _given(key: str) -> str:
    return f"key:{key}"
