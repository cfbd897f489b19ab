"""Read a new job's files under a lease and move it on: `queued` with its plan, or `failed` with every bad row named.

Does not cover: the checks themselves (`validation`, `rows`). Called by the runner, never by the API (design §6.9).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from app.core.settings import Settings
from app.db.engine import Database
from app.db.tables import Job
from app.files import jsonl
from app.files import service as files
from app.files.storage import Shelf, Storage
from app.graders.schemas import parse_grader
from app.jobs import events, leases
from app.jobs.headers import mask_headers
from app.jobs.plan import Plan, resolve
from app.jobs.rows import RowSpec
from app.jobs.validation import (
    FileReport,
    Refusal,
    TooSlow,
    refusal,
    too_many_evaluations,
    validate_rows,
    warnings,
)
from app.models.catalogue import BaseModel, BrokenModel, Catalogue, ModelError
from app.rendering.protocol import ChatRenderer, MessageNotRenderable, RenderingError
from app.rendering.registry import load_renderer
from app.storage.errors import ObjectDamaged, ObjectMissing, StorageUnavailable

log = logging.getLogger(__name__)

LEASE_S = 300.0
DEADLINE_S = 240.0  # below the lease, so that a slow reader has stopped before another may start


@dataclass(frozen=True)
class Outcome:
    """What reading the files came to: exactly one of `plan` and `refusal` is there."""

    plan: Plan | None
    refusal: Refusal | None
    warnings: tuple[tuple[str, dict[str, Any]], ...] = ()


async def validate_job(
    database: Database,
    settings: Settings,
    catalogue: Catalogue,
    job_id: str,
    owner: str,
    *,
    load: Callable[[BaseModel], ChatRenderer] = load_renderer,
) -> None:
    """Claim, read in a thread, finish. Returns at once when someone else reads; a job cancelled meanwhile stays so.

    While storage does not answer the job waits: it is read again once this lease has run out.
    """
    async with database.begin() as session:
        job = await leases.claim_validation(session, job_id, owner, LEASE_S)
        if job is None:
            return
        await events.append(
            session,
            project_id=job.project_id,
            job_id=job_id,
            message=f"Validating training file: {job.training_file} and validation file: {job.validation_file}",
        )
        shelf = await files.shelf(
            session, Storage.of(settings), [job.training_file, *filter(None, [job.validation_file])]
        )
    stop = threading.Event()
    try:
        outcome = await asyncio.to_thread(_validate, job, settings, shelf, catalogue, load, stop)
    except StorageUnavailable as error:
        log.warning("job %s: its files cannot be read now: %s", job_id, error)
        return
    except Exception:  # our bug: the log has it, and the job must not come back every five minutes for ever
        log.exception("job %s: checking its files failed", job_id)
        message = "The files could not be checked because of an internal error; the server's log has the details"
        outcome = Outcome(None, Refusal("internal_error", message, "training_file", {}))
    finally:
        stop.set()  # a cancelled runner must not wait for the thread
    await _record(database, job, owner, outcome)


def _validate(
    job: Job,
    settings: Settings,
    shelf: Shelf,
    catalogue: Catalogue,
    load: Callable[[BaseModel], ChatRenderer],
    stop: threading.Event,
) -> Outcome:
    """Blocking. What the user or the installation can cause comes back as a refusal; anything else is our bug."""
    try:
        model = catalogue.get(job.model)
        renderer = load(model)
    except BrokenModel as error:
        log.error("%s: %s", job.id, error)
        return Outcome(None, Refusal("model_not_usable", error.public, "model", {}))
    except (ModelError, RenderingError) as error:
        return Outcome(None, Refusal("model_not_usable", str(error), "model", {}))
    context = min(model.context, settings.sampler_max_model_len)
    return read_files(job, shelf, model, PromptCheck(renderer, context), stop)


@dataclass(frozen=True)
class PromptCheck:
    """Renders a row as the first turn of its rollouts will: it must leave room for at least one token."""

    renderer: ChatRenderer
    context: int

    def __call__(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        try:
            length = len(self.renderer.prompt(row["messages"], row.get("tools") or None))
        except MessageNotRenderable as error:
            return error.param, error.reason
        if length >= self.context:
            return "messages", f"the prompt has {length} tokens; the context is {self.context}"
        return None


def read_files(
    job: Job,
    shelf: Shelf,
    model: BaseModel,
    prompt: PromptCheck,
    stop: threading.Event,
    within_s: float = DEADLINE_S,
) -> Outcome:
    """Blocking: both files row by row, then the plan. Raises StorageUnavailable."""
    reinforcement = mask_headers(job.method)["reinforcement"]
    tools = frozenset(str(tool["name"]) for tool in reinforcement.get("tools", ()))
    spec = RowSpec(tools, parse_grader(reinforcement["grader"]), prompt)
    ends = time.monotonic() + within_s

    def late() -> bool:
        return stop.is_set() or time.monotonic() > ends

    valid_id = job.validation_file or ""
    reports: list[FileReport] = []
    for param, file_id in (("training_file", job.training_file), ("validation_file", valid_id)):
        try:
            with shelf.open(file_id) as file:
                reports.append(validate_rows(jsonl.rows(file), spec, late=late))
        except (ObjectMissing, ObjectDamaged, OSError) as error:
            log.warning("job %s: cannot read %s: %s", job.id, file_id, error)
            return _refused(param, f"File {file_id} can no longer be read; upload it again")
        except TooSlow:
            return _refused(param, f"File {file_id} could not be checked within {within_s:.0f} seconds")
    train, valid = reports
    if refused := refusal(train, valid, job.training_file, valid_id):
        return Outcome(None, refused)
    plan = resolve(job.method, job.options, train.n_rows, valid.n_rows, model, job.seed)
    if refused := too_many_evaluations(valid.n_rows, plan.eval_samples):
        return Outcome(None, refused)
    return Outcome(plan, None, tuple(warnings(train, valid, tools)))


def _refused(param: str, message: str) -> Outcome:
    return Outcome(None, Refusal(f"invalid_{param}", message, param, {}))


async def _record(database: Database, job: Job, owner: str, outcome: Outcome) -> None:
    """One transaction: the new status and the events that explain it."""
    plan = outcome.plan.as_dict() if outcome.plan else None
    error = outcome.refusal.error if outcome.refusal else None
    async with database.begin() as session:
        if not await leases.finish_validation(session, job.id, owner, plan=plan, error=error):
            return
        for message, data in outcome.warnings:
            await events.append(
                session, project_id=job.project_id, job_id=job.id, level="warn", message=message, data=data
            )
        if outcome.refusal is not None:
            await events.append(
                session,
                project_id=job.project_id,
                job_id=job.id,
                level="error",
                message=outcome.refusal.message,
                data=outcome.refusal.data,
            )
        else:
            await events.append(
                session,
                project_id=job.project_id,
                job_id=job.id,
                message="Files validated, moving job to queued state",
            )
