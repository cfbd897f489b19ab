"""All SQL on webhook endpoints and on deliveries that wait.

Does not cover: writing the outbox (`outbox`), nor what an answer means (`delivery`).

Who sends is decided by one conditional UPDATE per row that counts `attempts` up and moves `due_at` on; an attempt ends
with `WHERE attempts = its own`, so any number of senders may run and one that comes back too late changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Update, delete, exists, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from app.db.engine import now, rows_changed
from app.db.tables import WebhookDelivery, WebhookEndpoint

PENDING, DELIVERED, GIVEN_UP = "pending", "delivered", "given_up"
MAX_ERROR_CHARS = 500


@dataclass(frozen=True)
class Attempt:
    """A won attempt: everything a request is made of. `at` is the database's time."""

    seq: int
    number: int
    at: float
    delivery: WebhookDelivery
    endpoint: WebhookEndpoint


@dataclass(frozen=True)
class Backlog:
    """What an endpoint has not got: still tried, and given up."""

    waiting: int
    given_up: int


async def add(session: AsyncSession, endpoint: WebhookEndpoint) -> None:
    session.add(endpoint)
    await session.flush()


async def get(session: AsyncSession, project_id: str, endpoint_id: str) -> WebhookEndpoint | None:
    query = select(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id, WebhookEndpoint.project_id == project_id)
    return await session.scalar(query)


async def endpoints(session: AsyncSession, project_id: str) -> Sequence[WebhookEndpoint]:
    """Oldest first."""
    query = select(WebhookEndpoint).where(WebhookEndpoint.project_id == project_id)
    return (await session.scalars(query.order_by(WebhookEndpoint.created_at, WebhookEndpoint.id))).all()


async def backlogs(session: AsyncSession, project_id: str) -> Mapping[str, Backlog]:
    """By endpoint id; one that got everything is absent."""
    state = WebhookDelivery.state
    query = (
        select(
            WebhookDelivery.endpoint_id,
            func.count().filter(state == PENDING),
            func.count().filter(state == GIVEN_UP),
        )
        .where(WebhookDelivery.project_id == project_id, state != DELIVERED)
        .group_by(WebhookDelivery.endpoint_id)
    )
    found = (await session.execute(query)).all()
    return {endpoint: Backlog(waiting, given_up) for endpoint, waiting, given_up in found}


async def replace_secret(session: AsyncSession, endpoint_id: str, sealed: str, overlap_s: float) -> None:
    """The secret in force becomes the old one for `overlap_s`."""
    await session.execute(
        update(WebhookEndpoint)
        .where(WebhookEndpoint.id == endpoint_id)
        .values(secret=sealed, old_secret=WebhookEndpoint.secret, old_secret_until=now() + overlap_s)
        .execution_options(synchronize_session=False)
    )


async def remove(session: AsyncSession, endpoint_id: str) -> None:
    """Its deliveries go with it."""
    await session.execute(delete(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id))


async def due(session: AsyncSession, limit: int, per_endpoint: int) -> Sequence[tuple[int, int]]:
    """(seq, attempts so far) of deliveries that may be tried now; no endpoint takes more than its share.

    An event waits for the earlier ones of the same job at the same endpoint: a receiver hears them in order.
    """
    earlier = aliased(WebhookDelivery)
    first_in_line = ~exists().where(
        earlier.endpoint_id == WebhookDelivery.endpoint_id,
        earlier.job_id == WebhookDelivery.job_id,
        earlier.state == PENDING,
        earlier.seq < WebhookDelivery.seq,
    )
    place = func.row_number().over(partition_by=WebhookDelivery.endpoint_id, order_by=WebhookDelivery.seq)
    found = (
        select(WebhookDelivery.seq, WebhookDelivery.attempts, place.label("place"))
        .where(WebhookDelivery.state == PENDING, WebhookDelivery.due_at <= now(), first_in_line)
        .subquery()
    )
    query = select(found.c.seq, found.c.attempts).where(found.c.place <= per_endpoint)
    rows = await session.execute(query.order_by(found.c.place, found.c.seq).limit(limit))
    return [(seq, attempts) for seq, attempts in rows.all()]


async def claim(session: AsyncSession, seq: int, attempts: int, lease_s: float) -> Attempt | None:
    """Own the next attempt of a delivery for `lease_s`. None: another sender was faster."""
    won = await rows_changed(
        session,
        update(WebhookDelivery)
        .where(
            WebhookDelivery.seq == seq,
            WebhookDelivery.attempts == attempts,
            WebhookDelivery.state == PENDING,
            WebhookDelivery.due_at <= now(),
        )
        .values(attempts=attempts + 1, due_at=now() + lease_s),
    )
    if won != 1:
        return None
    query = (
        select(WebhookDelivery, WebhookEndpoint, now())
        .join(WebhookEndpoint, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
        .where(WebhookDelivery.seq == seq)
    )
    delivery, endpoint, at = (await session.execute(query)).one()
    return Attempt(seq, attempts + 1, at, delivery, endpoint)


async def delivered(session: AsyncSession, attempt: Attempt, status: int) -> bool:
    """False: the attempt is no longer ours."""
    done = update(WebhookDelivery).values(state=DELIVERED, finished_at=now(), response_status=status, last_error=None)
    return await rows_changed(session, _fenced(done, attempt)) == 1


async def failed(
    session: AsyncSession, attempt: Attempt, *, status: int | None, error: str, again_in_s: float | None
) -> bool:
    """Note why, and when to try again (None: never). False: the attempt is no longer ours."""
    later = {"due_at": now() + again_in_s} if again_in_s is not None else {"state": GIVEN_UP, "finished_at": now()}
    noted = update(WebhookDelivery).values(response_status=status, last_error=error[:MAX_ERROR_CHARS], **later)
    return await rows_changed(session, _fenced(noted, attempt)) == 1


def _fenced(statement: Update, attempt: Attempt) -> Update:
    return statement.where(
        WebhookDelivery.seq == attempt.seq,
        WebhookDelivery.attempts == attempt.number,
        WebhookDelivery.state == PENDING,
    )


async def disable(session: AsyncSession, endpoint_id: str, reason: str) -> None:
    """Nothing is written for the endpoint from now on, and what waits for it is given up."""
    await session.execute(
        update(WebhookEndpoint)
        .where(WebhookEndpoint.id == endpoint_id, WebhookEndpoint.disabled_at.is_(None))
        .values(disabled_at=now(), disabled_reason=reason)
        .execution_options(synchronize_session=False)
    )
    await session.execute(
        update(WebhookDelivery)
        .where(WebhookDelivery.endpoint_id == endpoint_id, WebhookDelivery.state == PENDING)
        .values(state=GIVEN_UP, finished_at=now(), last_error=reason)
        .execution_options(synchronize_session=False)
    )
