"""What a client may do with jobs: create one, look at it, list, cancel, pause, resume, read its events.

Does not cover: HTTP (`routes`), the rows of its files (`validation_service`), running it (`leases`, `workers`).
The caller owns the transaction; nothing here does I/O besides the session, so that a create holds the database's write
lock for a few milliseconds only (design §6.9).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from sqlalchemy.ext.asyncio import AsyncSession

from app.core.errors import InvalidRequest, NotFound
from app.core.ids import new_id
from app.core.paging import Page
from app.core.states import JobStatus
from app.db.tables import Event, File, Job
from app.jobs import events, idempotency, leases, meter, repository, state
from app.jobs.headers import Vault, seal_headers
from app.jobs.idempotency import Attempt
from app.jobs.parse import JobSpec
from app.jobs.plan import DEFAULT_MAX_STALENESS
from app.jobs.schemas import MAX_SEED
from app.models.catalogue import BrokenModel, Catalogue, UnknownModel
from app.webhooks import outbox

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobView:
    """A job with its ledger counts, read at the database's time `at`."""

    job: Job
    counts: Mapping[str, int]
    at: float


@dataclass(frozen=True)
class Draft:
    """A job that may be inserted: headers are sealed with its id, the seed is drawn."""

    job_id: str
    spec: JobSpec
    method: dict[str, Any]
    seed: int


def draft(spec: JobSpec, vault: Vault) -> Draft:
    """The part of a create that needs no database."""
    job_id = new_id("ftjob-")
    seed = spec.request.seed if spec.request.seed is not None else secrets.randbelow(MAX_SEED + 1)
    return Draft(job_id, spec, seal_headers(spec.method, vault, job_id), seed)


def check_room(spec: JobSpec, *, adapter_slots: int) -> None:
    """A run holds `max_staleness + 2` adapter slots of its sampler, chat one; a run that needs more never starts.

    Raises InvalidRequest.
    """
    staleness = int(spec.options.get("max_staleness", DEFAULT_MAX_STALENESS))
    most = adapter_slots - 3
    if staleness > most:
        raise InvalidRequest(
            f"hone.max_staleness: {staleness} needs {staleness + 2} adapter slots beside one for chat, and the "
            f"samplers of this server have {adapter_slots} (HONE_SAMPLER_MAX_ADAPTERS); ask for at most {most}, or "
            "raise the setting and restart.",
            param="hone.max_staleness",
        )


def check_model(catalogue: Catalogue, spec: JobSpec, *, max_lora_rank: int) -> None:
    """Blocking (reads the catalogue). Raises InvalidRequest unless the model is here and can hold what is asked.

    `max_lora_rank`: what the samplers were started with; an adapter above it would be found out at the first
    publication only.
    """
    name = spec.request.model
    if name.startswith("ft:"):
        raise InvalidRequest(
            f"{name!r} is a fine-tuned model; going on from one is not supported yet. Start from a base model.",
            param="model",
        )
    try:
        model = catalogue.get(name)
    except UnknownModel as error:
        raise InvalidRequest(str(error), param="model", code="model_not_found") from None
    except BrokenModel as error:
        log.error("%s", error)
        raise InvalidRequest(error.public, param="model", code="model_not_found") from None
    for option in ("max_tokens_per_turn", "max_tokens_per_episode"):
        if spec.options.get(option, 0) > model.context:
            param = f"hone.{option}"
            raise InvalidRequest(f"{param}: {name} has a context of {model.context} tokens", param=param)
    rank = int(spec.options.get("lora_rank", model.lora_rank))
    if rank > max_lora_rank:
        raise InvalidRequest(
            f"hone.lora_rank: {rank} is above {max_lora_rank}, the highest rank that the samplers of this server take "
            f"(HONE_SAMPLER_MAX_LORA_RANK); ask for less, or raise the setting and restart.",
            param="hone.lora_rank",
        )


async def create(session: AsyncSession, made: Draft, attempt: Attempt) -> Job:
    """Insert the job and its first event, or find the job that the same request made before."""
    existing = await idempotency.find(session, attempt)
    if existing is None:
        request = made.spec.request
        await _check_file(session, attempt.project_id, request.training_file, "training_file")
        await _check_file(session, attempt.project_id, request.validation_file or "", "validation_file")
        if not await idempotency.remember(session, attempt, made.job_id):
            existing = await idempotency.find(session, attempt)
    if existing is not None:
        return await _get(session, attempt.project_id, existing)
    await _insert(session, made, attempt.project_id)
    return await _get(session, attempt.project_id, made.job_id)


async def _insert(session: AsyncSession, made: Draft, project_id: str) -> None:
    request = made.spec.request
    await repository.add(
        session,
        id=made.job_id,
        project_id=project_id,
        status=JobStatus.VALIDATING,
        model=request.model,
        training_file=request.training_file,
        validation_file=request.validation_file,
        suffix=request.suffix,
        seed=made.seed,
        user_metadata=request.metadata,
        method=made.method,
        options=made.spec.options,
    )
    await events.append(
        session, project_id=project_id, job_id=made.job_id, message=f"Created fine-tuning job: {made.job_id}"
    )
    if made.spec.ignored:
        ignored = list(made.spec.ignored[:50])
        await events.append(
            session,
            project_id=project_id,
            job_id=made.job_id,
            level="warn",
            message=f"Unknown fields of the request were ignored: {', '.join(ignored)}",
            data={"ignored": ignored},
        )


async def _check_file(session: AsyncSession, project_id: str, file_id: str, param: str) -> None:
    file: File | None = await repository.file(session, project_id, file_id)
    if file is None:
        raise InvalidRequest(f"{param}: no such File object: {file_id}", param=param)
    if file.purpose != "fine-tune":
        raise InvalidRequest(
            f"{param}: file {file_id} has the purpose {file.purpose!r}; upload it with purpose 'fine-tune'", param=param
        )


async def view(session: AsyncSession, project_id: str, job_id: str) -> JobView:
    """Raises NotFound."""
    job = await _get(session, project_id, job_id)
    counts = await repository.rollout_counts(session, [job_id])
    return JobView(job, counts[job_id], await repository.clock(session))


async def list_jobs(
    session: AsyncSession, project_id: str, *, after: str | None, limit: int, metadata: Mapping[str, str] | None
) -> Page[JobView]:
    """Newest first. Raises InvalidRequest for an unknown `after`."""
    last = None
    if after is not None:
        last = await repository.get(session, project_id, after)
        if last is None:
            bad_cursor(after)
    page = Page.of(await repository.list_jobs(session, project_id, after=last, limit=limit, metadata=metadata), limit)
    counts = await repository.rollout_counts(session, [job.id for job in page.items])
    at = await repository.clock(session)
    return Page([JobView(job, counts[job.id], at) for job in page.items], page.has_more)


async def cancel(session: AsyncSession, project_id: str, job_id: str) -> None:
    """Immediate: the worker's next write fails its fence. Raises NotFound, InvalidRequest when it has ended."""
    job = await _get(session, project_id, job_id)
    allowed = state.allowed(JobStatus(job.status), JobStatus.CANCELLED, state.Actor.CLIENT)
    if not allowed or not await repository.cancel(session, project_id, job_id):
        await session.refresh(job)
        raise InvalidRequest(f'Cannot cancel a job {job_id} that already has status "{job.status}".')
    await leases.close_open_rollouts(session, job_id)
    await events.append(session, project_id=project_id, job_id=job_id, message="Fine-tuning job cancelled")
    await outbox.enqueue(session, job_id, JobStatus.CANCELLED)
    await session.refresh(job)


async def pause(session: AsyncSession, project_id: str, job_id: str) -> None:
    """Immediate, as `cancel` is: the last snapshot follows the last finished step, so only unfinished work is dropped.

    A job that is paused already stays so, without a second event. Raises NotFound, InvalidRequest in another status.
    """
    job = await _get(session, project_id, job_id)
    if job.status == JobStatus.PAUSED:
        return
    was = JobStatus(job.status)
    changed = state.allowed(was, JobStatus.PAUSED, state.Actor.CLIENT) and await repository.pause(
        session, project_id, job_id
    )
    await session.refresh(job)
    if not changed:
        if job.status == JobStatus.PAUSED:  # another request was faster
            return
        raise InvalidRequest(
            f'Cannot pause a job {job_id} that has status "{job.status}"; only a queued or running job can be paused.'
        )
    await leases.close_open_rollouts(session, job_id)
    where = f" after step {job.step}" if was is JobStatus.RUNNING else ""
    await events.append(
        session,
        project_id=project_id,
        job_id=job_id,
        message=f"Fine-tuning job paused{where} by a client",
        data={"step": job.step},
    )
    await outbox.enqueue(session, job_id, JobStatus.PAUSED)


async def resume(session: AsyncSession, project_id: str, job_id: str) -> None:
    """paused → queued: the next worker goes on from the last snapshot. Raises NotFound, InvalidRequest.

    A job whose budget of GPU hours is spent is granted as much again: whoever resumes it wants it to go on.
    """
    job = await _get(session, project_id, job_id)
    granted = meter.granted_s(job)
    allowed = state.allowed(JobStatus(job.status), JobStatus.QUEUED, state.Actor.CLIENT)
    if not allowed or not await repository.resume(session, project_id, job_id, granted):
        await session.refresh(job)
        raise InvalidRequest(
            f'Cannot resume a job {job_id} that has status "{job.status}"; only a paused job can be resumed.'
        )
    await session.refresh(job)
    more, data = "", None
    if granted is not None:
        spent, limit = job.gpu_seconds / meter.HOUR_S, granted / meter.HOUR_S
        more = f"; its budget is raised to {limit:.4g} GPU hours, {spent:.4g} are spent"
        data = {"gpu_hours": round(spent, 6), "max_gpu_hours": round(limit, 6)}
    message = f"Resume requested; the job is queued and goes on from step {job.step}{more}"
    await events.append(session, project_id=project_id, job_id=job_id, message=message, data=data)


async def list_events(
    session: AsyncSession, project_id: str, job_id: str, *, after: str | None, limit: int, ascending: bool
) -> Page[Event]:
    """Raises NotFound for the job, InvalidRequest for an unknown `after`."""
    await _get(session, project_id, job_id)
    seq = None
    if after is not None:
        seq = await repository.event_seq(session, job_id, after)
        if seq is None:
            bad_cursor(after)
    found = await repository.list_events(session, job_id, after=seq, limit=limit, ascending=ascending)
    return Page.of(found, limit)


async def require(session: AsyncSession, project_id: str, job_id: str) -> None:
    """For the lists below a job: raises NotFound unless the project has it."""
    await _get(session, project_id, job_id)


def bad_cursor(after: str) -> NoReturn:
    raise InvalidRequest(f"after: no item {after[:100]!r} in this list", param="after")


async def _get(session: AsyncSession, project_id: str, job_id: str) -> Job:
    job = await repository.get(session, project_id, job_id)
    if job is None:
        raise NotFound(f"Could not find fine tune: {job_id}", param="fine_tune_id", code="fine_tune_not_found")
    return job
