"""What an endpoint may ask for: the services, the caller behind the key, a page of a list.

Does not cover: transactions. A route opens its own, `async with database.begin() as session`, and services only flush.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.core.errors import Forbidden, RateLimited, Unauthenticated
from app.core.roles import Role
from app.core.settings import Settings
from app.db.engine import Database
from app.files.storage import Storage
from app.jobs.doorbell import Doorbell
from app.models.catalogue import Catalogue
from app.rollouts.traces import Traces
from app.samplers.service import Samplers
from app.security.api_keys import PREFIX, Caller, KeyRing
from app.security.rates import RateLimits, duration
from app.security.vault import Vault

MAX_PAGE = 1000
READING = frozenset({"GET", "HEAD"})


@dataclass(frozen=True)
class Services:
    """Everything that lives as long as the process; `app.state.services`."""

    settings: Settings
    database: Database
    storage: Storage
    traces: Traces
    catalogue: Catalogue
    keys: KeyRing
    rates: RateLimits | None  # None: no limit
    vault: Vault
    samplers: Samplers
    doorbell: Doorbell


@dataclass(frozen=True)
class PageQuery:
    """`after` is the id of the last item already seen; the repository fetches `limit + 1` rows."""

    after: str | None
    limit: int


_bearer = HTTPBearer(
    auto_error=False, scheme_name="ApiKey", description="A key made with `hone keys create NAME`, as a bearer token."
)


def services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


def _settings(request: Request) -> Settings:
    return services(request).settings


def _database(request: Request) -> Database:
    return services(request).database


def _storage(request: Request) -> Storage:
    return services(request).storage


def _traces(request: Request) -> Traces:
    return services(request).traces


def _catalogue(request: Request) -> Catalogue:
    return services(request).catalogue


def _vault(request: Request) -> Vault:
    return services(request).vault


def _samplers(request: Request) -> Samplers:
    return services(request).samplers


def _doorbell(request: Request) -> Doorbell:
    return services(request).doorbell


async def caller(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Caller:
    """Who sent this request; raises Unauthenticated or RateLimited. The key appears in no message and no log line."""
    if credentials is None or not credentials.credentials:
        raise Unauthenticated(
            "You didn't provide an API key. Send it as 'Authorization: Bearer YOUR_KEY'; "
            "`hone keys create NAME` on the server makes one."
        )
    here = services(request)
    async with here.database.read() as session:
        found = await here.keys.find(session, credentials.credentials)
    if found is None:
        raise Unauthenticated(
            f"Incorrect API key provided. A key of this server begins with '{PREFIX}'; "
            "`hone keys create NAME` on the server makes one."
        )
    request.state.key_id = found.key_id
    _count(request, here.rates, found)
    if found.stale:
        async with here.database.begin() as session:
            await here.keys.renew(session, found.key_id, credentials.credentials)
    return found


def _count(request: Request, rates: RateLimits | None, found: Caller) -> None:
    if rates is None:
        return
    allowance = rates.take(found.key_id)
    request.state.answer_headers = allowance.headers()  # `RequestContext` puts them on every answer, errors too
    if not allowance.granted:
        raise RateLimited(
            f"Rate limit reached for API key {found.key_id}: {allowance.limit} requests at once. "
            f"Please try again in {duration(allowance.wait_s)}.",
            retry_after_s=allowance.wait_s,
        )


async def permitted(request: Request, found: Annotated[Caller, Depends(caller)]) -> None:
    """Whether the key's role covers this request: looking needs `read`, all else `run`. Raises Forbidden."""
    needed = Role.READ if request.method in READING else Role.RUN
    if not found.role.covers(needed):
        raise Forbidden(
            f"You have insufficient permissions for this operation: it needs the role '{needed}', and this API key "
            f"({found.key_id}) has '{found.role}'. `hone keys create NAME --role {needed}` on the server makes one."
        )


def page(default: int = 20) -> Any:
    """The dependency that reads `after` and `limit`: `Annotated[PageQuery, page(10)]`."""

    def read(
        after: Annotated[str | None, Query(description="Id of the last item of the previous page.")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Most items to return.")] = default,
    ) -> PageQuery:
        return PageQuery(after, limit)

    return Depends(read)


CallerDep = Annotated[Caller, Depends(caller)]
ServicesDep = Annotated[Services, Depends(services)]
SettingsDep = Annotated[Settings, Depends(_settings)]
DatabaseDep = Annotated[Database, Depends(_database)]
StorageDep = Annotated[Storage, Depends(_storage)]
TracesDep = Annotated[Traces, Depends(_traces)]
CatalogueDep = Annotated[Catalogue, Depends(_catalogue)]
VaultDep = Annotated[Vault, Depends(_vault)]
SamplersDep = Annotated[Samplers, Depends(_samplers)]
DoorbellDep = Annotated[Doorbell, Depends(_doorbell)]
PageDep = Annotated[PageQuery, page()]
