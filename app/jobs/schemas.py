"""What a client may write in a create request, after `normalise` has brought it into the canonical shape (contract §2).

Does not cover: the aliases of §2.3 (`normalise`), graders (`app.graders.schemas`), tools (`app.tools.schemas`), answers
(`view`). A pydantic error never leaves this room: `parse` turns the first one into a 400 with a dotted path.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

Auto = Literal["auto"]
Off = Literal["off"]
MAX_SEED = 2**31 - 1
LARGEST = sys.float_info.max  # NaN is not below it, and whole numbers may be above
TOP_LEVEL = frozenset(
    {
        "model",
        "training_file",
        "validation_file",
        "method",
        "suffix",
        "seed",
        "metadata",
        "integrations",
        "hyperparameters",
        "hone",
    }
)


def _auto_int(low: int, high: int | None = None) -> Callable[[Any], Any]:
    bounds = f"between {low} and {high}" if high is not None else f"of at least {low}"

    def check(value: Any) -> Any:
        if value is None or value == "auto":
            return "auto"
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            raise ValueError(f'must be "auto" or a whole number {bounds}')
        return value

    return check


def _auto_float(above: float, high: float | None = None) -> Callable[[Any], Any]:
    bounds = f"above {above:.5f}".rstrip("0").rstrip(".") + (f" and at most {high:g}" if high is not None else "")

    def check(value: Any) -> Any:
        if value is None or value == "auto":
            return "auto"
        fits = not isinstance(value, bool) and isinstance(value, int | float) and above < value <= LARGEST
        if not fits or (high is not None and value > high):
            raise ValueError(f'must be "auto" or a number {bounds}')
        return value

    return check


def _exact_loss(value: Any) -> Any:
    """Losses whose token mean is exact over a whole optimizer step; TRL's others average micro-batches."""
    if value is None or value in ("dapo", "cispo", "vespo"):
        return value
    raise ValueError(
        "must be dapo, cispo or vespo: they weigh every token of a step alike, however it is cut into micro-batches"
    )


def _range(value: Any) -> Any:
    if value is None or value == "off":
        return value
    numbers = isinstance(value, list | tuple) and all(
        isinstance(part, int | float) and not isinstance(part, bool) and abs(part) <= LARGEST for part in value
    )
    if not numbers or len(value) != 2 or not 0 <= value[0] < 1 < value[1]:
        raise ValueError('must be "off" or [low, high] with 0 <= low < 1 < high')
    return (float(value[0]), float(value[1]))


def _positive_or_off(value: Any) -> Any:
    if value is None or value == "off":
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError('must be "off" or a number above 0 and at most 1')
    return float(value)


class Hyperparameters(BaseModel):
    """`method.reinforcement.hyperparameters` with the limits of contract §2.2; null means `auto`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_epochs: Annotated[int | Auto, BeforeValidator(_auto_int(1, 50))] = "auto"
    batch_size: Annotated[int | Auto, BeforeValidator(_auto_int(1, 256))] = "auto"
    learning_rate_multiplier: Annotated[float | Auto, BeforeValidator(_auto_float(0.0))] = "auto"
    compute_multiplier: Annotated[float | Auto, BeforeValidator(_auto_float(0.00001, 10.0))] = "auto"
    eval_interval: Annotated[int | Auto, BeforeValidator(_auto_int(1))] = "auto"
    eval_samples: Annotated[int | Auto, BeforeValidator(_auto_int(1, 1000))] = "auto"
    reasoning_effort: Annotated[
        Literal["default", "low", "medium", "high"], BeforeValidator(lambda v: "default" if v is None else v)
    ] = "default"


class JsonSchemaFormat(BaseModel):
    """The JSON Schema of a structured answer. A `$ref` out of it is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    strict: bool | None = None
    json_schema: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


class Reinforcement(BaseModel):
    """How to train: the grader gives the reward, `tools` are the endpoints that the model may call."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    grader: dict[str, Any]
    tools: list[Any] | None = None
    max_episode_steps: Annotated[int, Field(strict=True, ge=1, le=1000)] | None = None
    response_format: ResponseFormat | None = None
    hyperparameters: Annotated[Hyperparameters, BeforeValidator(lambda v: {} if v is None else v)] = Hyperparameters()


_Seconds = Annotated[float, Field(strict=True, gt=0, le=600, allow_inf_nan=False)]


class HoneOptions(BaseModel):
    """The `hone` object: what has no place in OpenAI's schema. Absent means: the default that the plan resolves."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    max_tokens_per_turn: Annotated[int, Field(ge=1, le=131072)] | None = None  # default 512
    max_tokens_per_episode: Annotated[int, Field(ge=1, le=1_000_000)] | None = None  # default 4096
    tool_timeout_s: _Seconds | None = None  # default 120
    grader_timeout_s: _Seconds | None = None  # default 120
    rollout_timeout_s: Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)] | None = None  # default 900
    learning_rate: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None  # default: from the catalogue
    lora_rank: Annotated[int, Field(ge=1, le=256)] | None = None  # default: from the catalogue
    max_staleness: Annotated[int, Field(ge=0, le=8)] | None = None  # default 1; 0 = strictly on-policy
    max_trained_rollouts: Annotated[int, Field(ge=1)] | None = None  # per step; default: all
    loss_type: Annotated[Literal["dapo", "cispo", "vespo"], BeforeValidator(_exact_loss)] | None = None  # default dapo
    kl_beta: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = None  # KL to the base; default 0
    importance_range: Annotated[tuple[float, float] | Off, BeforeValidator(_range)] | None = None  # default [0.5, 2]
    max_sequence_tv: Annotated[float | Off, BeforeValidator(_positive_or_off)] | None = None  # default 0.25
    on_no_signal: Literal["stop", "continue"] | None = None  # steps in a row that teach nothing; default stop
    max_gpu_hours: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None  # then it pauses


_MetadataKey = Annotated[str, StringConstraints(max_length=64)]
_MetadataValue = Annotated[str, StringConstraints(max_length=512)]
_FileId = Annotated[str, StringConstraints(min_length=1, max_length=128)]


class CreateJob(BaseModel):
    """A reinforcement fine-tuning job. Unknown top-level fields are ignored with a warning event."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    training_file: _FileId
    validation_file: _FileId | None = None
    suffix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    metadata: Annotated[dict[_MetadataKey, _MetadataValue], Field(max_length=16)] | None = None
