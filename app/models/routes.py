"""`/v1/models`: list, retrieve.

Does not cover: deletion of a fine-tuned model. A name may hold `:` and, percent-encoded, `/` (contract §1.6).
"""

from __future__ import annotations

from fastapi import APIRouter

from app.models import service
from app.models.schemas import ModelList, ModelObject
from app.web.deps import CallerDep, CatalogueDep, DatabaseDep, SettingsDep

router = APIRouter()


@router.get("/models")
async def list_models(
    caller: CallerDep, database: DatabaseDep, catalogue: CatalogueDep, settings: SettingsDep
) -> ModelList:
    async with database.read() as session:
        data = await service.listed(session, catalogue, caller.project_id, settings.organization_id)
    return ModelList(data=data)


@router.get("/models/{model:path}")
async def retrieve_model(
    model: str, caller: CallerDep, database: DatabaseDep, catalogue: CatalogueDep, settings: SettingsDep
) -> ModelObject:
    async with database.read() as session:
        return await service.find(session, catalogue, caller.project_id, settings.organization_id, model)
