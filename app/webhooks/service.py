"""What an operator may do with a project's webhook endpoints: add, list, rotate the secret, remove.

Does not cover: the command (`app.cli.webhooks`), nor sending (`delivery`). The caller owns the transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.errors import InvalidRequest, NotFound
from app.core.ids import new_id
from app.db.engine import now
from app.db.tables import WebhookEndpoint
from app.net.endpoint import check_url
from app.security.vault import Vault
from app.webhooks import repository
from app.webhooks.repository import Backlog
from app.webhooks.schemas import EVENT_TYPES
from app.webhooks.signing import new_secret

OVERLAP_S = 24 * 3600.0  # how long the secret before a rotation still signs


@dataclass(frozen=True)
class EndpointView:
    """An endpoint and what it has not got."""

    endpoint: WebhookEndpoint
    backlog: Backlog


@dataclass(frozen=True)
class Issued:
    """An endpoint's secret, which is shown this once."""

    endpoint_id: str
    secret: str


async def add(session: AsyncSession, vault: Vault, project_id: str, url: str, events: Sequence[str] = ()) -> Issued:
    """A new endpoint; no `events` means all. Raises InvalidRequest for the URL or an unknown type."""
    try:
        check_url(url)
    except ValueError as error:
        raise InvalidRequest(f"The webhook's URL {error}.", param="url") from None
    for type_ in events:
        if type_ not in EVENT_TYPES:
            raise InvalidRequest(f"Unknown event {type_!r}; there are {', '.join(EVENT_TYPES)}.", param="events")
    issued = Issued(new_id("we_"), new_secret())
    await repository.add(
        session,
        WebhookEndpoint(
            id=issued.endpoint_id,
            project_id=project_id,
            url=url,
            events=[type_ for type_ in EVENT_TYPES if not events or type_ in events],
            secret=vault.seal(issued.secret, issued.endpoint_id),
            created_at=await session.scalar(select(now())),
        ),
    )
    return issued


async def list_endpoints(session: AsyncSession, project_id: str) -> Sequence[EndpointView]:
    backlogs = await repository.backlogs(session, project_id)
    found = await repository.endpoints(session, project_id)
    return [EndpointView(endpoint, backlogs.get(endpoint.id, Backlog(0, 0))) for endpoint in found]


async def rotate(session: AsyncSession, vault: Vault, project_id: str, endpoint_id: str) -> Issued:
    """A new secret; for a day requests carry the signature of the one before as well. Raises NotFound."""
    await _require(session, project_id, endpoint_id)
    issued = Issued(endpoint_id, new_secret())
    await repository.replace_secret(session, endpoint_id, vault.seal(issued.secret, endpoint_id), OVERLAP_S)
    return issued


async def remove(session: AsyncSession, project_id: str, endpoint_id: str) -> None:
    """Forget it and what waits for it. Raises NotFound."""
    await _require(session, project_id, endpoint_id)
    await repository.remove(session, endpoint_id)


async def _require(session: AsyncSession, project_id: str, endpoint_id: str) -> None:
    if await repository.get(session, project_id, endpoint_id) is None:
        raise NotFound(
            f"No such webhook endpoint: {endpoint_id}. `hone webhooks list` shows those of {project_id}.", param="id"
        )
