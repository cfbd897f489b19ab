"""What a run needs before its first rollout, read from the claimed job: plan, rows, renderer, endpoints, grader.

Does not cover: the samplers and the trainer, which `workers.run` starts, and faults in the rows, which validation found
before any worker was claimed. What is wrong here fails the job before anything is spent, as a `JobFailure`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.core.errors import ServiceError
from app.core.settings import Settings
from app.db.tables import Job
from app.files import jsonl
from app.files.storage import Shelf
from app.graders.base import Grader
from app.graders.build import build_grader
from app.graders.schemas import parse_grader
from app.jobs.headers import open_headers
from app.jobs.plan import Plan
from app.models.catalogue import BaseModel, BrokenModel, Catalogue, ModelError
from app.net.clients import HttpClient, guarded_client
from app.net.endpoint import Mask
from app.net.guard import EgressPolicy
from app.rendering.protocol import ChatRenderer
from app.rendering.registry import load_renderer
from app.security.vault import load_vault
from app.storage.errors import ObjectDamaged, ObjectMissing
from app.tools.http import EndpointUnreachable, ToolEndpoint, dial
from app.tools.schemas import parse_tools
from workers.rollouts.types import Limits, Row

CANARY_TOKENS = 192  # of one sequence
CANARY_SCORED = 256  # in all, at least, as the bands were measured with; 800 tokens cost 1.0–1.5 s a step
CANARY_ROWS = 32  # looked at, at most


class JobFailure(Exception):
    """The job cannot go on, for a reason its owner can act on; becomes `jobs.error`."""

    def __init__(
        self, code: str, message: str, param: str | None = None, detail: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.detail = detail


@dataclass(frozen=True)
class Inputs:
    """Everything that does not change while the job runs."""

    job: Job
    plan: Plan
    model: BaseModel
    train: Sequence[Row]
    valid: Sequence[Row]
    renderer: ChatRenderer
    http: HttpClient
    endpoints: Mapping[str, ToolEndpoint]
    grader: Grader
    grader_urls: Mapping[str, str]  # param path → URL, for the dial
    limits: Limits
    canary: list[list[int]]
    wants_json: bool = False  # the job has a `response_format`
    model_warnings: Sequence[str] = ()  # of the check of its chat format at registration


async def read_inputs(settings: Settings, job: Job, files: Shelf, executor: Executor) -> Inputs:
    """Read and check everything. Raises `JobFailure`, `StorageUnavailable`."""
    plan = Plan.from_dict(job.plan or {})
    catalogue = Catalogue(settings.models_dir)
    try:
        model = catalogue.get(job.model)
    except BrokenModel as error:
        raise JobFailure("model_not_found", error.public, "model") from error
    except ModelError as error:
        raise JobFailure("model_not_found", str(error), "model") from error
    vault = load_vault(settings.secret_key.get_secret_value() if settings.secret_key else None, settings.root)
    reinforcement = open_headers(job.method, vault, job.id)["reinforcement"]
    http = guarded_client(
        EgressPolicy.parse(settings.egress_allow),
        timeout_s=max(plan.tool_timeout_s, plan.grader_timeout_s),
        max_connections=2 * settings.max_concurrent_rollouts,
    )
    try:
        tools = parse_tools(reinforcement.get("tools") or [])
        spec = parse_grader(reinforcement["grader"])
    except ServiceError as error:
        raise JobFailure("invalid_method", error.message, error.param) from error
    mask = Mask.of(*(tool.headers for tool in tools), *spec.secrets())  # one server may know the secrets of another
    loop = asyncio.get_running_loop()
    train = await loop.run_in_executor(executor, _read_rows, files, job.training_file, "training_file")
    valid: list[Row] = []
    if job.validation_file:
        valid = await loop.run_in_executor(executor, _read_rows, files, job.validation_file, "validation_file")
    renderer = await loop.run_in_executor(executor, load_renderer, model)
    return Inputs(
        job=job,
        plan=plan,
        model=model,
        train=train,
        valid=valid,
        renderer=renderer,
        http=http,
        endpoints={tool.name: tool.endpoint(mask) for tool in tools},
        grader=build_grader(spec, http, timeout_s=plan.grader_timeout_s, mask=mask),
        grader_urls=_urls(reinforcement["grader"], "method.reinforcement.grader"),
        limits=Limits(
            max_steps=plan.max_episode_steps,
            max_tokens_per_turn=plan.max_tokens_per_turn,
            max_tokens_per_episode=plan.max_tokens_per_episode,
            context=min(model.context, settings.sampler_max_model_len),
            tool_timeout_s=plan.tool_timeout_s,
            grader_timeout_s=plan.grader_timeout_s,
            rollout_timeout_s=plan.rollout_timeout_s,
        ),
        canary=_canary(renderer, train),
        wants_json=reinforcement.get("response_format") is not None,
        model_warnings=catalogue.check(model.id).get("warnings", ()),
    )


async def dial_endpoints(inputs: Inputs) -> None:
    """Reach every tool and grader once, before the first rollout. Raises `JobFailure` naming URL and reason."""
    targets = {f"method.reinforcement.tools ({e.name})": e.server_url for e in inputs.endpoints.values()}
    targets |= inputs.grader_urls
    by_url: dict[str, str] = {}
    for param, url in targets.items():
        by_url.setdefault(url, param)

    async def one(url: str, param: str) -> None:
        try:
            await dial(inputs.http, url)
        except EndpointUnreachable as error:
            kind = "grader" if "grader" in param else "tool"
            raise JobFailure(
                f"{kind}_unreachable",
                f"The {kind} endpoint {error.url} does not answer ({error.reason}). No rollout was started.",
                param,
                {"url": error.url, "reason": error.reason},
            ) from error

    await asyncio.gather(*(one(url, param) for url, param in by_url.items()))


def check_snapshot(directory: str, sha256: str) -> None:
    """Its manifest is the one that the step's row names; the trainer checks the files by it. Blocking.

    Raises `JobFailure`; and `OSError` where it cannot be read, which may pass.
    """
    manifest = Path(directory) / "manifest.json"
    if hashlib.sha256(manifest.read_bytes()).hexdigest() != sha256:
        raise JobFailure("snapshot_changed", f"{manifest} is not what was registered with its step")


def _canary(renderer: ChatRenderer, rows: Sequence[Row]) -> list[list[int]]:
    """Ends of distinct prompts, two or more, until enough tokens are scored: all of a sequence but its first."""
    found: list[list[int]] = []
    for row in rows[:CANARY_ROWS]:
        ids = renderer.prompt(list(row.messages), list(row.tools) or None)[-CANARY_TOKENS:]
        if ids not in found:
            found.append(ids)
        if len(found) > 1 and sum(len(each) - 1 for each in found) >= CANARY_SCORED:
            break
    return found


def write_canary(path: Path, canary: list[list[int]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(canary))
    return str(path)


def _read_rows(files: Shelf, file_id: str, param: str) -> list[Row]:
    try:
        with files.open(file_id) as file:
            return [Row(line - 1, item) for line, item in jsonl.rows(file) if not isinstance(item, jsonl.BadRow)]
    except (ObjectMissing, ObjectDamaged) as error:
        raise JobFailure(f"invalid_{param}", f"File {file_id} can no longer be read: {error}", param) from error


def _urls(grader: Mapping[str, Any], where: str) -> dict[str, str]:
    """URLs of all endpoint graders in a grader object, by path."""
    if grader.get("type") == "endpoint":
        return {f"{where}.url": str(grader["url"])}
    found: dict[str, str] = {}
    parts = grader.get("graders")
    if isinstance(parts, Mapping):
        for name, part in parts.items():
            found |= _urls(part, f"{where}.graders.{name}")
    return found
