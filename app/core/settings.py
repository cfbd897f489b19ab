"""Every setting once, with the sentence an operator reads: `HONE_<NAME>` in the environment, or `HONE_<NAME>_FILE`.

Does not cover: a job's own options (`app.jobs.schemas.HoneOptions`).
"""

from __future__ import annotations

import os
import socket
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

PREFIX = "HONE_"


class _FileSource(PydanticBaseSettingsSource):
    """`HONE_X_FILE=/run/secrets/x` gives the content of that file to `x`, without its last newline."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        path = os.environ.get(f"{PREFIX}{field_name.upper()}_FILE")
        if path is None:
            return None, field_name, False
        try:
            return Path(path).read_text().rstrip("\n"), field_name, False
        except OSError as error:
            raise ValueError(f"{PREFIX}{field_name.upper()}_FILE: cannot read {path}: {error.strerror}") from error

    def __call__(self) -> dict[str, Any]:
        found = ((name, self.get_field_value(info, name)[0]) for name, info in self.settings_cls.model_fields.items())
        return {name: value for name, value in found if value is not None}


class Settings(BaseSettings):
    """Read once at start; only this class knows whether the embedded or the production set-up is in force."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True)

    data_dir: Path = Field(
        Path("data"), description="Everything Hone writes: database, files, models, adapters, traces."
    )
    database_url: str | None = Field(None, description="SQLAlchemy URL; default: SQLite (WAL) in the data directory.")
    redis_url: str | None = Field(
        None, description="Redis that `hone worker` is rung over, which does not start without; `hone up` ignores it."
    )
    queues: str = Field(
        "", description="Which queue a model's jobs are rung on: model=queue, … with * in model names; others: hone."
    )
    storage_url: str | None = Field(
        None,
        description="Where files, checkpoints and traces are kept: a folder or an fsspec URL such as "
        "s3://bucket/prefix (extra `s3`); default: the data directory.",
    )
    storage_options: SecretStr | None = Field(
        None, description="JSON object of options for that URL's library: endpoint, credentials; default: its own."
    )
    collect_after_s: float = Field(
        86_400.0, ge=600, description="Directories of jobs that no row names are removed once unchanged this long."
    )
    rows_kept_days: int = Field(30, ge=1, description="Days that delivered and given-up webhooks are kept.")
    logs_kept_days: int = Field(30, ge=1, description="Days that logs of ended jobs are kept.")
    traces_max_mb_per_job: int = Field(
        2048, ge=0, description="MB of traces kept of a job, oldest steps removed first; 0: no limit."
    )
    host: str = Field("127.0.0.1", description="Address the API listens on.")
    port: int = Field(8000, ge=0, le=65535, description="Port the API listens on.")
    log_format: Literal["text", "json"] = Field("text", description="One line of text, or one JSON object, a log line.")
    secret_key: SecretStr | None = Field(None, description="Key for secrets at rest; default: made in data_dir.")
    egress_allow: str = Field("", description="Private targets user URLs may reach: host:port or CIDR[:port], …")
    max_file_bytes: int = Field(512 * 1024**2, gt=0, description="Largest upload to /v1/files.")
    models_allowed: str = Field(
        "", description="Base models that jobs and chats may name, comma-separated; default: all that are installed."
    )
    rate_limit_per_minute: int = Field(
        60_000, ge=0, description="Requests that one API key may send a minute, per API process; 0: no limit."
    )
    rate_limit_burst: int = Field(2_000, ge=1, description="Requests that one API key may send at once.")
    organization_id: str = Field("org-hone", description="Shown as organization_id and inside model names.")
    hostname: str = Field(
        default_factory=socket.gethostname,
        pattern=r"^[\w.-]+$",
        description="This host in leases and lists, and its folder of logs; default: what the system calls it.",
    )

    runner_slots: int = Field(1, ge=1, description="Jobs that the embedded runner runs at once.")
    lease_seconds: float = Field(
        60.0, ge=2, description="A job whose worker is silent this long is taken up by another."
    )
    max_crashes: int = Field(3, ge=1, description="Crashes without a finished step in between before a job is failed.")
    trainer_silence_s: float = Field(900.0, gt=0, description="A trainer that reports nothing for this long is ended.")

    sampler_engine: Literal["auto", "builtin", "vllm"] = Field(
        "auto", description="What samples: vLLM where a GPU and a vLLM are found, else the built-in engine on the CPU."
    )
    sampler_dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="Compute type of samplers; say it for a vLLM in HONE_SAMPLER_URLS, which does not tell."
    )
    sampler_max_adapters: int = Field(
        8, ge=3, description="Adapter versions a sampler holds at once; vLLM's --max-loras."
    )
    sampler_max_lora_rank: int = Field(
        64,
        ge=1,
        le=512,
        description="Highest LoRA rank a sampler takes; unset, a vLLM on the CPU takes the model's own.",
    )
    sampler_max_model_len: int = Field(4096, ge=128, description="Longest context served (capped by the model).")
    sampler_start_s: float = Field(300.0, gt=0, description="A sampler that is not healthy after this long has failed.")
    sampler_idle_s: float = Field(900.0, gt=0, description="A sampler nobody asked for this long is stopped.")
    sampler_urls: str = Field(
        "", description="Samplers that already run, comma-separated; the keeper then starts none."
    )
    sampler_data_dir: Path | None = Field(
        None, description="The data directory as those samplers see it; default: under the same path."
    )
    vllm_python: Path | None = Field(
        None, description="Python of vLLM's own environment; default: .venv-vllm/bin/python in the checkout."
    )
    vllm_tensor_parallel: int = Field(1, ge=1, description="GPUs that one vLLM server spans.")
    vllm_data_parallel: int = Field(1, ge=1, description="vLLM servers per base model, each on GPUs of its own.")
    vllm_gpu_memory: float | None = Field(
        None, gt=0, lt=1, description="Share of a GPU's memory vLLM takes; default: 0.9, or 0.45 beside the trainer."
    )
    vllm_cpu_kv_gib: int = Field(2, ge=1, description="GiB for keys and values of a vLLM that runs on the CPU.")
    vllm_args: str = Field("", description="More arguments for vLLM, as in a shell; they win over ours.")
    trainer_dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="Compute type of the trainer.")
    trainer_launch: Path | None = Field(
        None,
        description="File in accelerate's format: how many processes share an update; default: one on each free GPU.",
    )
    threads: int = Field(0, ge=0, description="CPU threads of sampler and trainer; 0 = all cores.")
    max_concurrent_rollouts: int = Field(256, ge=1, description="Trajectories one job keeps in flight.")

    @field_validator("storage_url")
    @classmethod
    def _storage_is_absolute(cls, url: str | None) -> str | None:
        if url and "://" not in url and not Path(url).is_absolute():
            raise ValueError("give an absolute path or a URL: processes start in many places")
        return url

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _FileSource(settings_cls)

    @cached_property
    def root(self) -> Path:
        """The data directory, absolute: worker processes may have another working directory."""
        return self.data_dir.expanduser().resolve()

    @property
    def database(self) -> str:
        """The database URL in force (async driver)."""
        return self.database_url or f"sqlite+aiosqlite:///{self.root / 'hone.db'}"

    @property
    def files_dir(self) -> Path:
        return self.root / "files"

    @property
    def models_dir(self) -> Path:
        return self.root / "models"

    @property
    def jobs_dir(self) -> Path:
        return self.root / "jobs"

    @property
    def adapters_dir(self) -> Path:
        """Published adapter versions; must be visible to trainer and sampler under this same path."""
        return self.root / "adapters"

    @property
    def seen_root(self) -> Path:
        """The data directory as samplers see it."""
        return self.sampler_data_dir if self.sampler_data_dir is not None and self.sampler_urls else self.root

    @property
    def checkpoints_dir(self) -> Path:
        return self.root / "checkpoints"

    @property
    def traces_dir(self) -> Path:
        return self.root / "traces"

    @property
    def cache_dir(self) -> Path:
        """Copies of what is in storage; may be deleted while no process runs."""
        return self.root / "cache"

    @property
    def checkpoint_copies_dir(self) -> Path:
        return self.cache_dir / "checkpoints"

    @property
    def incoming_dir(self) -> Path:
        """Files on their way out of storage. What a killed process left there is cleared away."""
        return self.cache_dir / "incoming"

    @property
    def logs_dir(self) -> Path:
        return self.root / "logs"

    @property
    def cpu_threads(self) -> int:
        return self.threads or os.cpu_count() or 1

    def environment(self) -> dict[str, str]:
        """What a child process needs so that its own `Settings()` equals this one."""
        values = self.model_dump(exclude_none=True, exclude_unset=True)
        env = {
            f"{PREFIX}{name.upper()}": value.get_secret_value() if isinstance(value, SecretStr) else str(value)
            for name, value in values.items()
        }
        env[f"{PREFIX}DATA_DIR"] = str(self.root)
        return env
