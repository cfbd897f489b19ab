"""An installation as a user runs it, `hone up` with a data directory of its own, driven by the openai client.

Does not cover: the user's tools and grader (`tool_server`), and what the ledger says afterwards (`ledger`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from app.models.catalogue import BaseModel
from benchmarks.harness.processes import ROOT, process, wait_until
from deploy.local.ports import free_port

FINISHED = ("succeeded", "failed", "cancelled")
START_S = 120.0
POLL_S = 0.5


class JobFailed(Exception):
    """The job did not succeed; the message holds its error."""


@dataclass(frozen=True)
class JobSpec:
    """What a benchmark asks of a job. `batch` rows × `group` rollouts a step; group is a multiple of 8 / 2."""

    model: str
    train: Sequence[Mapping[str, Any]]
    valid: Sequence[Mapping[str, Any]]
    steps: int
    batch: int
    group: int
    max_episode_steps: int
    tool_url: str
    tools: Sequence[str]
    hone: Mapping[str, Any]
    seed: int = 1


@dataclass(frozen=True)
class Service:
    """A running installation."""

    data: Path
    client: OpenAI

    @property
    def database(self) -> Path:
        return self.data / "hone.db"

    def create(self, spec: JobSpec) -> str:
        """Upload both files, create the job; its id. Validation only at the start and after the last step."""
        files = [
            self.client.files.create(file=(f"{name}.jsonl", _jsonl(rows)), purpose="fine-tune").id
            for name, rows in (("train", spec.train), ("valid", spec.valid))
        ]
        epochs, rest = divmod(spec.steps * spec.batch, len(spec.train))
        if rest:
            raise ValueError(f"{spec.steps} steps of {spec.batch} rows are no whole epochs of {len(spec.train)} rows")
        reinforcement: dict[str, Any] = {
            "grader": {"type": "endpoint", "name": "bench", "url": f"{spec.tool_url}/grade"},
            "max_episode_steps": spec.max_episode_steps,
            "hyperparameters": {
                "batch_size": spec.batch,
                "compute_multiplier": spec.group / 8,
                "n_epochs": epochs,
                "eval_interval": spec.steps,
                "eval_samples": 1,
            },
        }
        if spec.tools:
            urls = {name: f"{spec.tool_url}/tools/{name}" for name in spec.tools}
            reinforcement["tools"] = [{"name": name, "server_url": url} for name, url in urls.items()]
        job = self.client.fine_tuning.jobs.create(
            model=spec.model,
            training_file=files[0],
            validation_file=files[1],
            seed=spec.seed,
            method={"type": "reinforcement", "reinforcement": reinforcement},  # type: ignore[arg-type]
            extra_body={"hone": dict(spec.hone)},
        )
        return job.id

    def wait(self, job_ids: Sequence[str], timeout_s: float, watch: Callable[[], None] = lambda: None) -> None:
        """Until all have succeeded; `watch` is called at every poll. Raises JobFailed, TimeoutError."""
        deadline = time.monotonic() + timeout_s
        left = list(job_ids)
        while left:
            job = self.client.fine_tuning.jobs.retrieve(left[0])
            if job.status == "succeeded":
                left.pop(0)
                continue
            if job.status in FINISHED:
                raise JobFailed(f"{job.id} {job.status}: {job.error}\n{self.last_logs()}")
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{job.id} is still {job.status} after {timeout_s:.0f} s: {job.to_json(warnings=False)}"
                )
            watch()
            time.sleep(POLL_S)

    def last_logs(self) -> str:
        logs = sorted((self.data / "logs").glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)


@contextmanager
def service(root: Path, models: Sequence[BaseModel], tool_url: str, **settings: str) -> Iterator[Service]:
    """`hone up` below `root` with these models; `settings` are HONE_… variables without the prefix, in lower case."""
    data, port = root / "data", free_port()
    (data / "models").mkdir(parents=True)
    for model in models:
        # Weights by link where it is one disk: they are read only, and may be large.
        one_disk = model.path.stat().st_dev == data.stat().st_dev
        shutil.copytree(model.path, data / "models" / model.id, copy_function=os.link if one_disk else shutil.copy2)
    environment = {
        "HONE_DATA_DIR": str(data),
        "HONE_PORT": str(port),
        "HONE_EGRESS_ALLOW": tool_url.removeprefix("http://"),
        **{f"HONE_{name.upper()}": value for name, value in settings.items()},
    }
    with process(["-m", "app.cli.main", "up"], log=root / "up.log", environment=environment):
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: _answers(f"{url}/healthz"), START_S, "hone up")
        key = subprocess.run(
            [sys.executable, "-m", "app.cli.main", "keys", "create", "bench"],
            cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=True,
        ).stdout.strip()  # fmt: skip
        yield Service(data, OpenAI(base_url=f"{url}/v1", api_key=key, timeout=60))


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
