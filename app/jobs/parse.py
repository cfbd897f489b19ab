"""A create body → `JobSpec`, or one 400 that names the field: the faults that are visible without a database.

Does not cover: whether model and files exist (`service`), the rows of the files (`validation`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from app.core.errors import InvalidRequest
from app.graders.schemas import parse_grader
from app.jobs import json_schema
from app.jobs.normalise import reinforcement_of
from app.jobs.schemas import TOP_LEVEL, CreateJob, HoneOptions, Reinforcement
from app.tools.schemas import parse_tools, refusal

WHERE = "method.reinforcement"
MAX_BODY_BYTES = 4 * 1024 * 1024
_M = TypeVar("_M", bound=BaseModel)


@dataclass(frozen=True)
class JobSpec:
    """A request that is right in itself. `method` is canonical and still holds its secret header values."""

    request: CreateJob
    method: dict[str, Any]
    options: dict[str, Any]  # the `hone` object as given, without nulls
    ignored: tuple[str, ...]  # unknown top-level fields
    request_hash: str


def parse_json(raw: bytes) -> dict[str, Any]:
    """The body as an object. Refuses NaN, which JSON lacks, and lone surrogates, which no database keeps."""
    try:
        body = json.loads(raw, parse_constant=_no_constant, parse_float=_finite)
        json.dumps(body, ensure_ascii=False).encode()
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply") from None
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object")
    return body


def parse_create(body: Mapping[str, Any]) -> JobSpec:
    """Raises InvalidRequest for the first fault; its `param` is a path such as `hone.lora_rank`."""
    request = _model(CreateJob, body, "")
    raw = reinforcement_of(body)
    if body.get("hyperparameters"):
        raise InvalidRequest(
            f"hyperparameters belong in {WHERE}.hyperparameters; the top-level field is for supervised jobs",
            param="hyperparameters",
        )
    if body.get("integrations"):
        raise InvalidRequest("integrations are not supported yet; leave the field out", param="integrations")
    if request.validation_file is None:
        raise InvalidRequest(
            "validation_file is required for reinforcement fine-tuning: the baseline and every evaluation run on it",
            param="validation_file",
        )
    options = _options(body.get("hone"))
    return JobSpec(
        request=request,
        method={"type": "reinforcement", "reinforcement": _reinforcement(raw)},
        options=options.model_dump(exclude_none=True),
        ignored=tuple(sorted(str(key)[:64] for key in set(body) - TOP_LEVEL - {"rft"})),
        request_hash=hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest(),
    )


def _reinforcement(raw: dict[str, Any]) -> dict[str, Any]:
    """The canonical object with graders and tools read by their rooms; `auto` and nulls written out."""
    parsed = _model(Reinforcement, raw, WHERE)
    grader = parse_grader(parsed.grader, where=f"{WHERE}.grader")
    tools = parse_tools(parsed.tools, where=f"{WHERE}.tools")
    response_format = None
    if parsed.response_format is not None:
        where = f"{WHERE}.response_format.json_schema.schema"
        if problem := json_schema.problem(parsed.response_format.json_schema.json_schema):
            raise InvalidRequest(f"{where}: {problem}", param=where)
        response_format = parsed.response_format.model_dump(by_alias=True, exclude_unset=True)
    canonical: dict[str, Any] = {
        "grader": grader.model_dump(mode="json", exclude_none=True, by_alias=True),
        "hyperparameters": parsed.hyperparameters.model_dump(),
        "response_format": response_format,
    }
    if tools:
        canonical["tools"] = [tool.model_dump(mode="json") for tool in tools]
    if parsed.max_episode_steps is not None:
        canonical["max_episode_steps"] = parsed.max_episode_steps
    return canonical


def _options(given: object) -> HoneOptions:
    if given is None:
        return HoneOptions()
    if not isinstance(given, dict):
        raise InvalidRequest("hone must be an object", param="hone")
    options = _model(HoneOptions, given, "hone")
    turn, episode = options.max_tokens_per_turn, options.max_tokens_per_episode
    if turn is not None and episode is not None and turn > episode:
        raise InvalidRequest(
            "hone.max_tokens_per_turn is above hone.max_tokens_per_episode", param="hone.max_tokens_per_turn"
        )
    return options


def _model(cls: type[_M], value: Mapping[str, Any], where: str) -> _M:
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        fault = refusal(error, where, known=cls.model_fields)
        raise InvalidRequest(fault.message.removeprefix("."), param=(fault.param or "").removeprefix(".")) from None


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large")
    return value
