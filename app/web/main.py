"""`create_app`: the services, the routes of every slice, and what surrounds them.

Does not cover: starting it (`hone up`) or the workers it never sees: they meet in the database.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI

from app.core.settings import Settings
from app.db.engine import Database
from app.files.storage import Storage
from app.models.catalogue import Catalogue
from app.security.api_keys import KeyRing, load_peppers
from app.security.vault import load_vault
from app.web import errors, health
from app.web.deps import Services, caller
from app.web.middleware import BodyLimit, RequestContext


def _optional(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


def build_services(settings: Settings) -> Services:
    """Everything the routes need; touches the disk only for the key secret."""
    database = Database(settings.database)
    secret = settings.secret_key
    samplers = _optional("app.samplers.service", "Samplers")
    return Services(
        settings=settings,
        database=database,
        storage=Storage(settings.files_dir),
        catalogue=Catalogue(settings.models_dir),
        keys=KeyRing(load_peppers(settings)),
        vault=load_vault(secret.get_secret_value() if secret else None, settings.root),
        samplers=samplers(database, settings) if samplers else None,
    )


def create_app(settings: Settings) -> FastAPI:
    """The ASGI application; the database must already be migrated (`app.db.migrate.upgrade`)."""
    services = build_services(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        services.storage.sweep()
        yield
        if services.samplers is not None:
            await services.samplers.close()
        await services.database.close()

    made = FastAPI(title="Hone", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    made.state.services = services
    errors.install(made)
    made.add_middleware(BodyLimit)
    made.add_middleware(RequestContext)  # added last = outermost
    made.include_router(health.router)
    made.include_router(_v1())
    return made


def _v1() -> APIRouter:
    """Everything under /v1 needs a key, so that a slice cannot forget to ask for one."""
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(caller)], responses={"4XX": {"model": errors.ErrorResponse}})
    for slice_ in ("files", "jobs", "checkpoints", "rollouts", "models", "inference"):
        found = _optional(f"app.{slice_}.routes", "router")
        if found is not None:
            v1.include_router(found, tags=[slice_])
    return v1
