"""`/v1/fine_tuning/jobs`: create, list, retrieve, cancel, pause, resume, events (contract §2, §8).

Does not cover: checkpoints and rollouts of a job, which have routes of their own.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Request

from app.core.errors import InvalidRequest
from app.jobs import idempotency, service
from app.jobs.openapi import CREATE_BODY
from app.jobs.parse import parse_create, parse_json
from app.jobs.view import event_object, job_object
from app.jobs.wire import EventList, FineTuningJob, JobList
from app.web.deps import CallerDep, CatalogueDep, DatabaseDep, DoorbellDep, PageQuery, SettingsDep, VaultDep, page

router = APIRouter(prefix="/fine_tuning/jobs")


@router.post("", openapi_extra=CREATE_BODY)
async def create_job(
    request: Request,
    caller: CallerDep,
    database: DatabaseDep,
    settings: SettingsDep,
    catalogue: CatalogueDep,
    vault: VaultDep,
    doorbell: DoorbellDep,
    idempotency_key: Annotated[str | None, Header()] = None,
    x_stainless_retry_count: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> FineTuningJob:
    """Create a reinforcement fine-tuning job. Its files are validated afterwards; watch `status` and the events."""
    spec = parse_create(parse_json(await request.body()))
    service.check_room(spec, adapter_slots=settings.sampler_max_adapters)
    await asyncio.to_thread(service.check_model, catalogue, spec, max_lora_rank=settings.sampler_max_lora_rank)
    made = service.draft(spec, vault)
    attempt = idempotency.read_headers(caller.project_id, spec.request_hash, idempotency_key, x_stainless_retry_count)
    async with database.begin() as session:
        job = await service.create(session, made, attempt)
        found = await service.view(session, caller.project_id, job.id)
    doorbell.ring(found.job.id, found.job.model)
    return job_object(found.job, found.counts, organization_id=settings.organization_id, at=found.at)


@router.get("")
async def list_jobs(
    request: Request,
    caller: CallerDep,
    database: DatabaseDep,
    settings: SettingsDep,
    paging: Annotated[PageQuery, page(20)],
) -> JobList:
    """Jobs, newest first. `metadata[key]=value` filters; `metadata=null` selects jobs without metadata."""
    async with database.read() as session:
        found = await service.list_jobs(
            session, caller.project_id, after=paging.after, limit=paging.limit, metadata=_metadata_filter(request)
        )
    shown = [
        job_object(view.job, view.counts, organization_id=settings.organization_id, at=view.at) for view in found.items
    ]
    return JobList(
        data=shown,
        has_more=found.has_more,
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
    )


@router.get("/{job_id}")
async def retrieve_job(job_id: str, caller: CallerDep, database: DatabaseDep, settings: SettingsDep) -> FineTuningJob:
    """One job, with what it is doing now under `hone`."""
    async with database.read() as session:
        found = await service.view(session, caller.project_id, job_id)
    return job_object(found.job, found.counts, organization_id=settings.organization_id, at=found.at)


@router.post("/{job_id}/cancel")
async def cancel_job(job_id: str, caller: CallerDep, database: DatabaseDep, settings: SettingsDep) -> FineTuningJob:
    """Cancel at once. Checkpoints made so far stay usable."""
    async with database.begin() as session:
        await service.cancel(session, caller.project_id, job_id)
        found = await service.view(session, caller.project_id, job_id)
    return job_object(found.job, found.counts, organization_id=settings.organization_id, at=found.at)


@router.post("/{job_id}/pause")
async def pause_job(job_id: str, caller: CallerDep, database: DatabaseDep, settings: SettingsDep) -> FineTuningJob:
    """Free the hardware at once. What the job has finished is kept: it resumes from its last step."""
    async with database.begin() as session:
        await service.pause(session, caller.project_id, job_id)
        found = await service.view(session, caller.project_id, job_id)
    return job_object(found.job, found.counts, organization_id=settings.organization_id, at=found.at)


@router.post("/{job_id}/resume")
async def resume_job(
    job_id: str, caller: CallerDep, database: DatabaseDep, settings: SettingsDep, doorbell: DoorbellDep
) -> FineTuningJob:
    """Queue a paused job again."""
    async with database.begin() as session:
        await service.resume(session, caller.project_id, job_id)
        found = await service.view(session, caller.project_id, job_id)
    doorbell.ring(job_id, found.job.model)
    return job_object(found.job, found.counts, organization_id=settings.organization_id, at=found.at)


@router.get("/{job_id}/events")
async def list_events(
    job_id: str,
    caller: CallerDep,
    database: DatabaseDep,
    paging: Annotated[PageQuery, page(20)],
    order: Annotated[Literal["asc", "desc"], Query()] = "desc",
) -> EventList:
    """What happened, newest first unless `order=asc`."""
    async with database.read() as session:
        found = await service.list_events(
            session, caller.project_id, job_id, after=paging.after, limit=paging.limit, ascending=order == "asc"
        )
    shown = [event_object(event) for event in found.items]
    return EventList(
        data=shown,
        has_more=found.has_more,
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
    )


def _metadata_filter(request: Request) -> dict[str, str] | None:
    """`metadata[k]=v` pairs; `metadata=null` → an empty mapping; None when nothing was asked."""
    pairs: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name.startswith("metadata[") and name.endswith("]"):
            pairs[name[len("metadata[") : -1]] = value
    if pairs:
        return pairs
    plain = request.query_params.get("metadata")
    if plain is None:
        return None
    if plain != "null":
        raise InvalidRequest("metadata: send metadata[key]=value, or metadata=null", param="metadata")
    return {}
