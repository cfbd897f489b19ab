"""Jobs and events as they are answered: OpenAI's objects plus `hone` (contract §2.4, §8.1).

Does not cover: how a row becomes one (`view`), what a client may send (`schemas`).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.core.states import JobStatus


class JobError(BaseModel):
    """Why a job failed; `param` names the field of the request that is to blame, where there is one."""

    model_config = ConfigDict(extra="allow")

    code: str
    message: str
    param: str | None = None


class Activity(BaseModel):
    """What the job is doing now, and for how long it has said so."""

    text: str
    age_s: float | None


class RolloutCounts(BaseModel):
    """The ledger: `started` is the sum of `states`; the state `started` counts those that are still open."""

    started: int
    states: dict[str, int]


class Links(BaseModel):
    """Paths below this server."""

    events: str
    rollouts: str
    checkpoints: str


class Diagnosis(BaseModel):
    """Where the job's time went, all finished steps and validation passes together. `shares` sum to 1."""

    model_config = ConfigDict(extra="ignore")

    bound: str = Field(description="sampler, tool, queue, grader, trainer, publication, or none.")
    sentence: str
    shares: dict[str, float]
    rollouts_idle: float = Field(
        default=0.0, description="Share of the time in which sampling was held back by max_staleness; beside `shares`."
    )


class Overlap(BaseModel):
    """How far sampling runs ahead of training, now. Only while the job runs."""

    model_config = ConfigDict(extra="ignore")

    max_staleness: int
    version: int
    in_flight: int
    limit: int
    waiting_for: str | None = None


class GpuHours(BaseModel):
    """Running time of all attempts × the GPUs each held; `limit`: the job is paused once `spent` is there."""

    spent: float
    limit: float | None


class Hone(BaseModel):
    """What has no place in OpenAI's object. `seconds`: time spent per phase over all attempts."""

    attempt: int
    activity: Activity | None
    step: int
    total_steps: int | None
    rollouts: RolloutCounts
    plan: dict[str, Any] | None = Field(description="Every auto and default as a number; null until validated.")
    options: dict[str, Any] = Field(description="The hone object of the request.")
    seconds: dict[str, Any]
    gpu_hours: GpuHours
    diagnosis: Diagnosis | None = None
    overlap: Overlap | None = None
    congestion: dict[str, Any] | None = Field(default=None, description="Limits in force now, and what set them.")
    publication: dict[str, Any] | None = Field(default=None, description="The latest publication: phases and gates.")
    queue_reason: str | None
    links: Links


class FineTuningJob(BaseModel):
    """`fine_tuning.job`. `method` is canonical, header values are masked."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    status: JobStatus
    model: str
    fine_tuned_model: str | None
    organization_id: str
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    seed: int
    hyperparameters: dict[str, Any] = Field(description="Empty: see method.reinforcement.hyperparameters.")
    method: dict[str, Any]
    error: JobError | None
    integrations: list[Any] | None
    metadata: dict[str, str] | None
    user_provided_suffix: str | None
    hone: Hone


class JobEvent(BaseModel):
    """`fine_tuning.job.event`; a metrics event carries its numbers in `data`."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class JobList(BaseModel):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[FineTuningJob]
    has_more: bool
    first_id: str | None
    last_id: str | None


class EventList(BaseModel):
    """A page of events."""

    object: Literal["list"] = "list"
    data: list[JobEvent]
    has_more: bool
    first_id: str | None
    last_id: str | None
