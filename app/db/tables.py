"""Every table of the service: one class a table, illegal states ruled out by CHECK and UNIQUE constraints.

Does not cover: queries (each slice's `repository`), nor which transition is legal (`app.jobs.state`).
All times are seconds since the epoch by the database's clock (`app.db.engine.db_now`).
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from app.core.roles import Role
from app.core.states import JobStatus, RolloutState

DEFAULT_PROJECT = "proj_default"


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012
        dict[str, Any]: JSON(none_as_null=True),
        list[Any]: JSON(none_as_null=True),
        float: Float,
        str: String,
    }


def _one_of(column: str, values: type[JobStatus] | type[RolloutState] | type[Role]) -> str:
    return f"{column} IN ({', '.join(repr(str(v.value)) for v in values)})"


class ApiKey(Base):
    """A key as stored: HMAC-SHA256 of it with the server's secret; the key itself is shown once, at creation."""

    __tablename__ = "api_keys"
    __table_args__ = (CheckConstraint(_one_of("role", Role), name="role"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(index=True)
    name: Mapped[str]
    role: Mapped[str]
    digest: Mapped[str] = mapped_column(unique=True)  # begins with the id of the secret it was made with
    hint: Mapped[str]
    created_at: Mapped[float]
    revoked_at: Mapped[float | None]


class File(Base):
    """An uploaded or produced file; the bytes are at `files/<id>` in storage."""

    __tablename__ = "files"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(index=True)
    filename: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    status: Mapped[str]
    status_details: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[float]
    expires_at: Mapped[float | None]


class Job(Base):
    """The row *is* the job. A worker owns it only through `attempt` and an unexpired lease (design §4.1–2)."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(_one_of("status", JobStatus), name="status"),
        CheckConstraint("status = 'running' OR lease_owner IS NULL OR status = 'validating_files'", name="lease"),
        CheckConstraint("attempt >= 0 AND step >= 0 AND crashes >= 0", name="counters"),
        CheckConstraint("reserved_slots = 0 OR status = 'running'", name="slots"),
        CheckConstraint("running_since IS NULL OR status = 'running'", name="running_since"),
        Index("ix_jobs_status_created", "status", "created_at"),
        Index("ix_jobs_project_created", "project_id", "created_at"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str]
    status: Mapped[str]
    model: Mapped[str]
    training_file: Mapped[str]
    validation_file: Mapped[str | None]
    suffix: Mapped[str | None]
    seed: Mapped[int] = mapped_column(BigInteger)
    user_metadata: Mapped[dict[str, Any] | None]
    integrations: Mapped[list[Any] | None]
    method: Mapped[dict[str, Any]]  # canonical; header values sealed by app.security.vault
    options: Mapped[dict[str, Any]]  # the `hone` object as given
    plan: Mapped[dict[str, Any] | None]  # app.jobs.plan.resolve, once, then never changed
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    error: Mapped[dict[str, Any] | None]
    fine_tuned_model: Mapped[str | None] = mapped_column(unique=True)
    trained_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    result_files: Mapped[list[Any]] = mapped_column(JSON, default=list)

    attempt: Mapped[int] = mapped_column(default=0)  # the fencing token
    lease_owner: Mapped[str | None]
    lease_until: Mapped[float | None]
    crashes: Mapped[int] = mapped_column(default=0)  # since the last finished step
    reserved_slots: Mapped[int] = mapped_column(default=0)  # adapter slots this run holds on its sampler
    queue_reason: Mapped[str | None] = mapped_column(Text)
    running_since: Mapped[float | None]  # the claim of this attempt; what came before is in `gpu_seconds`
    gpus: Mapped[int] = mapped_column(default=1)  # that this attempt holds; 1 on a host without
    gpu_seconds: Mapped[float] = mapped_column(default=0.0)  # of ended attempts, see app.jobs.meter
    gpu_seconds_limit: Mapped[float | None]  # granted by a resume; before, the limit is in `options`
    step: Mapped[int] = mapped_column(default=0)
    total_steps: Mapped[int | None]
    activity: Mapped[str | None] = mapped_column(Text)
    activity_at: Mapped[float | None]
    seconds: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)  # time spent per phase, all attempts
    live: Mapped[dict[str, Any] | None]  # diagnosis, overlap, congestion, publication: the supervisor's latest word


class Event(Base):
    """What happened, newest last by `seq`; the event log of a job reads as one story over all attempts."""

    __tablename__ = "events"
    __table_args__ = (Index("ix_events_job_seq", "job_id", "seq"),)
    seq: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    project_id: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    created_at: Mapped[float]
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any] | None]


class Snapshot(Base):
    """Resume state after a step: where the trainer's files are and where the supervisor stood. Never listed."""

    __tablename__ = "snapshots"
    __table_args__ = (UniqueConstraint("job_id", "step", "attempt"),)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    project_id: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    step: Mapped[int]
    attempt: Mapped[int]
    path: Mapped[str] = mapped_column(Text)
    sha256: Mapped[str]
    cursor: Mapped[dict[str, Any]]
    created_at: Mapped[float]


class Checkpoint(Base):
    """A public, named, chat-able adapter; registered once per step."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "step"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    step: Mapped[int]
    attempt: Mapped[int]
    name: Mapped[str] = mapped_column(unique=True)
    base_model: Mapped[str]
    path: Mapped[str] = mapped_column(Text)
    sha256: Mapped[str]
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[float]


class Rollout(Base):
    """The ledger: every rollout that was started, in exactly one state (design §4.3), and where its trace is."""

    __tablename__ = "rollouts"
    __table_args__ = (
        CheckConstraint(_one_of("state", RolloutState), name="state"),
        CheckConstraint("split IN ('train', 'valid')", name="split"),
        CheckConstraint("state = 'started' OR finished_at IS NOT NULL", name="finished"),
        CheckConstraint("turns >= 0 AND tool_calls >= 0 AND completion_tokens >= 0", name="counters"),
        Index("ix_rollouts_job_step", "job_id", "step"),
        Index("ix_rollouts_job_state", "job_id", "state"),
        Index("ix_rollouts_job_seq", "job_id", "seq"),
    )
    seq: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)  # = trace_id
    project_id: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    attempt: Mapped[int]
    step: Mapped[int]  # the training step it is for; for validation the step just finished
    split: Mapped[str]
    greedy: Mapped[bool] = mapped_column(Boolean, default=False)
    row: Mapped[int]  # 0-based row of the dataset file
    group: Mapped[int]  # siblings share it, unique within the job's attempt
    sample: Mapped[int]
    version: Mapped[int]  # policy version that served every turn
    state: Mapped[str]
    reward: Mapped[float | None]
    advantage: Mapped[float | None]
    sub_scores: Mapped[dict[str, Any] | None]
    stop_reason: Mapped[str | None]
    truncated: Mapped[bool] = mapped_column(Boolean, default=False)
    turns: Mapped[int] = mapped_column(default=0)
    tool_calls: Mapped[int] = mapped_column(default=0)
    invalid_calls: Mapped[int] = mapped_column(default=0)
    completion_tokens: Mapped[int] = mapped_column(default=0)
    prompt_tokens: Mapped[int] = mapped_column(default=0)
    error: Mapped[str | None] = mapped_column(Text)
    started_at: Mapped[float]
    finished_at: Mapped[float | None]
    seconds: Mapped[dict[str, Any] | None]  # sampling, tools, grading
    trace_file: Mapped[str | None] = mapped_column(Text)  # relative to the traces directory
    trace_offset: Mapped[int | None] = mapped_column(BigInteger)
    trace_length: Mapped[int | None] = mapped_column(BigInteger)


class Sampler(Base):
    """A live sampler. A row without a fresh heartbeat is not live; a changed `started_at` means: load all again."""

    __tablename__ = "samplers"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str]
    base_model: Mapped[str] = mapped_column(index=True)
    url: Mapped[str]
    host: Mapped[str]
    adapter_root: Mapped[str] = mapped_column(Text)
    max_loras: Mapped[int]
    info: Mapped[dict[str, Any]]  # dtype, gemm_gflops, pid: what `hone doctor` shows
    started_at: Mapped[float]
    heartbeat: Mapped[float]


class SamplerWant(Base):
    """ "Please keep a sampler for this base model until then": how supervisors and chat ask the keeper."""

    __tablename__ = "sampler_wants"
    base_model: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str]
    wanted_until: Mapped[float]
    error: Mapped[str | None] = mapped_column(Text)  # why the keeper could not start one


class SamplerAdapter(Base):
    """An adapter that a sampler has loaded."""

    __tablename__ = "sampler_adapters"
    sampler_id: Mapped[str] = mapped_column(ForeignKey("samplers.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str]
    path: Mapped[str] = mapped_column(Text)
    loaded_at: Mapped[float]
    last_used: Mapped[float]


class AdapterPin(Base):
    """One user of a loaded adapter; it expires by itself, so a dead user cannot hold a slot (design §6.2)."""

    __tablename__ = "adapter_pins"
    sampler_id: Mapped[str] = mapped_column(ForeignKey("samplers.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str]
    pinned_until: Mapped[float]


class Duty(Base):
    """Work that recurs, for whoever moves `due_at` on first; one that dies at it costs no more than one round."""

    __tablename__ = "duties"
    name: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str]
    due_at: Mapped[float]


class IdempotencyKey(Base):
    """A create that was answered: the same request again gets the same answer (contract §1.3)."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (UniqueConstraint("project_id", "route", "key"),)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    project_id: Mapped[str]
    route: Mapped[str]
    key: Mapped[str]
    request_hash: Mapped[str] = mapped_column(index=True)
    resource_id: Mapped[str]
    created_at: Mapped[float]


class Worker(Base):
    """A process that lives long: runner or janitor, worker, keeper, supervisor. `GET /healthz` asks for a fresh runner.

    Its row goes with it. The row of one that was killed says which groups it may have left behind.
    """

    __tablename__ = "workers"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str]
    kind: Mapped[str]
    host: Mapped[str]
    place: Mapped[str]  # boot and pid namespace: where the numbers below mean something
    pid: Mapped[int]
    process_group: Mapped[int]
    process_started: Mapped[int] = mapped_column(BigInteger)  # clock ticks; tells a process from a later one of this id
    job_id: Mapped[str | None]  # of a supervisor
    trainer_pid: Mapped[int | None]  # leads the trainer's group
    trainer_started: Mapped[int | None] = mapped_column(BigInteger)
    started_at: Mapped[float]
    heartbeat: Mapped[float]


class WebhookEndpoint(Base):
    """Where a project hears about its jobs. Secrets are sealed by app.security.vault with the row's id."""

    __tablename__ = "webhook_endpoints"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(index=True)
    url: Mapped[str] = mapped_column(Text)
    events: Mapped[list[Any]]  # the types it wants
    secret: Mapped[str] = mapped_column(Text)
    old_secret: Mapped[str | None] = mapped_column(Text)  # signs as well until `old_secret_until`
    old_secret_until: Mapped[float | None]
    created_at: Mapped[float]
    disabled_at: Mapped[float | None]
    disabled_reason: Mapped[str | None] = mapped_column(Text)


class WebhookDelivery(Base):
    """The outbox: one event for one endpoint, written in the transaction that changed the job's status."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        CheckConstraint("state IN ('pending', 'delivered', 'given_up')", name="state"),
        CheckConstraint("state = 'pending' OR finished_at IS NOT NULL", name="finished"),
        UniqueConstraint("endpoint_id", "event_id"),
        Index("ix_webhook_deliveries_state_due", "state", "due_at"),
        Index("ix_webhook_deliveries_endpoint_job", "endpoint_id", "job_id", "seq"),
    )
    seq: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True)
    event_id: Mapped[str]  # the `webhook-id` of every attempt, so that a receiver can drop doubles
    project_id: Mapped[str]
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoints.id", ondelete="CASCADE"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    type: Mapped[str]
    created_at: Mapped[float]
    state: Mapped[str]
    attempts: Mapped[int] = mapped_column(default=0)  # the fencing token of an attempt
    due_at: Mapped[float]  # not before; a claim moves it on, so that a sender that died holds nothing up for long
    finished_at: Mapped[float | None]
    response_status: Mapped[int | None]
    last_error: Mapped[str | None] = mapped_column(Text)
