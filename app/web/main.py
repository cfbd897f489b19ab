"""`create_app`: the services, the routes of every slice, and what surrounds them.

Does not cover: starting it (`hone up`) or the workers it never sees: they meet in the database.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, Depends, FastAPI
from fastapi.routing import APIRoute

from app.checkpoints.routes import router as checkpoints
from app.core.settings import Settings
from app.db.engine import Database
from app.files.routes import router as files
from app.files.storage import Storage
from app.inference.routes import router as inference
from app.jobs.doorbell import make_doorbell
from app.jobs.routes import router as jobs
from app.models.catalogue import Catalogue, allowed_models
from app.models.routes import router as models
from app.rollouts.routes import router as rollouts
from app.rollouts.traces import Traces
from app.samplers.service import Samplers
from app.security.api_keys import KeyRing, load_peppers
from app.security.rates import RateLimits
from app.security.vault import load_vault
from app.web import errors, health, metrics, readiness
from app.web.deps import Services, permitted
from app.web.middleware import BodyLimit, RequestContext


def build_services(settings: Settings) -> Services:
    """Everything the routes need; touches the disk only for the key secret."""
    database = Database(settings.database)
    secret = settings.secret_key
    return Services(
        settings=settings,
        database=database,
        storage=Storage.of(settings),
        traces=Traces.of(settings),
        catalogue=Catalogue(settings.models_dir, allowed=allowed_models(settings.models_allowed)),
        keys=KeyRing(load_peppers(settings)),
        rates=RateLimits(settings.rate_limit_per_minute, settings.rate_limit_burst)
        if settings.rate_limit_per_minute
        else None,
        vault=load_vault(secret.get_secret_value() if secret else None, settings.root),
        samplers=Samplers(database, settings),
        doorbell=make_doorbell(settings),
    )


def create_app(settings: Settings) -> FastAPI:
    """The ASGI application; the database must already be migrated (`app.db.migrate.upgrade`)."""
    services = build_services(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        services.storage.sweep()
        yield
        await asyncio.to_thread(services.doorbell.close)
        await services.samplers.close()
        await services.database.close()

    made = FastAPI(
        title="Hone",
        version="1",  # of the contract (/v1), not of the package
        summary="Reinforcement fine-tuning for tool-calling agents, with the API of OpenAI's RFT.",
        servers=[{"url": "/"}],
        lifespan=lifespan,
        generate_unique_id_function=_operation_id,
        docs_url=None,  # their pages load scripts from elsewhere; `hone openapi` prints the contract
        redoc_url=None,
        openapi_url=None,
    )
    made.state.services = services
    made.state.metrics = metrics.Metrics(services.database)
    made.state.readiness = readiness.of_service(services.database, services.storage)
    errors.install(made)
    made.add_middleware(BodyLimit)
    made.add_middleware(RequestContext)
    made.add_middleware(metrics.Measured, metrics=made.state.metrics)  # added last = outermost
    for probe in (health, readiness, metrics):
        made.include_router(probe.router)
    made.include_router(_v1())
    return made


def _operation_id(route: APIRoute) -> str:
    """`create_file` → `createFile`, as OpenAI's own contract calls its operations."""
    first, *rest = route.name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def _v1() -> APIRouter:
    """Everything under /v1 needs a key whose role covers the request; here, so that a slice cannot forget to ask."""
    v1 = APIRouter(
        prefix="/v1",
        dependencies=[Depends(permitted)],
        responses={"4XX": {"model": errors.ErrorResponse}, "5XX": {"model": errors.ErrorResponse}},
    )
    v1.include_router(files, tags=["Files"])
    v1.include_router(jobs, tags=["Fine-tuning"])
    v1.include_router(checkpoints, tags=["Fine-tuning"])
    v1.include_router(rollouts, tags=["Rollouts"])
    v1.include_router(models, tags=["Models"])
    v1.include_router(inference)
    return v1
