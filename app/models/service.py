"""Which models a project may name: the installed base models, and what its own jobs made.

Does not cover: installing (`pull`, `register`) and serving (`app.inference`, `app.samplers`).
"""

from __future__ import annotations

import asyncio
import logging

from sqlalchemy.ext.asyncio import AsyncSession

from app.core.errors import NotFound
from app.models import repository
from app.models.catalogue import BaseModel, BrokenModel, Catalogue, UnknownModel, read_check
from app.models.repository import Tuned
from app.models.schemas import BaseModelFacts, HistoryCheck, ModelObject

log = logging.getLogger(__name__)

SYSTEM = "system"


async def listed(
    session: AsyncSession, catalogue: Catalogue, project_id: str, organization_id: str
) -> list[ModelObject]:
    """Base models by id, then tuned ones, newest first."""
    bases = await asyncio.to_thread(lambda: [_base(model) for model in catalogue.list()])
    tuned = await repository.tuned(session, project_id)
    return bases + [_tuned(entry, organization_id) for entry in tuned]


async def find(
    session: AsyncSession, catalogue: Catalogue, project_id: str, organization_id: str, name: str
) -> ModelObject:
    """Raises NotFound (`model_not_found`)."""
    try:
        return await asyncio.to_thread(lambda: _base(catalogue.get(name)))
    except UnknownModel:
        entries = await repository.tuned(session, project_id, name)
    except BrokenModel as error:
        log.error("%s", error)
        raise NotFound(error.public, param="model", code="model_not_found") from error
    if not entries:
        raise NotFound(
            f"The model `{name}` does not exist or you do not have access to it.", param="model", code="model_not_found"
        )
    return _tuned(entries[0], organization_id)


def _base(model: BaseModel) -> ModelObject:
    facts = BaseModelFacts(
        renderer=model.renderer,
        context=model.context,
        licence=model.licence,
        history=HistoryCheck.model_validate(read_check(model.path)),
    )
    return ModelObject(id=model.id, created=model.created, owned_by=SYSTEM, hone=facts)


def _tuned(entry: Tuned, organization_id: str) -> ModelObject:
    return ModelObject(id=entry.name, created=int(entry.created_at), owned_by=organization_id)
