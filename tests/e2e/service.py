"""A whole installation for end-to-end tests: `hone up` and the user's server as real processes, on free ports.

Does not cover: any fake. Model, tools, grader, database and HTTP are real; only their size is small.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from openai import OpenAI

from deploy.local.ports import free_port
from tests.e2e.agent_server import TOKEN
from tests.e2e.teach import ITEMS, LOOKUP, question

START_S = 60.0
LEASE_S = 6.0


class Service:
    """Context manager: everything it started has ended afterwards."""

    def __init__(self, root: Path, models: Path, **settings: str) -> None:
        self.data = root / "data"
        self.data.mkdir(parents=True)
        shutil.copytree(models, self.data / "models")
        self.agent_port, self.port, self.closed_port = free_port(), free_port(), free_port()
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HONE_")},
            "HONE_DATA_DIR": str(self.data),
            "HONE_PORT": str(self.port),
            "HONE_EGRESS_ALLOW": f"127.0.0.1:{self.agent_port},127.0.0.1:{self.closed_port}",
            "HONE_SAMPLER_DTYPE": "float32",
            "HONE_THREADS": "1",
            "HONE_LEASE_SECONDS": str(LEASE_S),
            "PYTHONWARNINGS": "default",
            **settings,
        }
        self._log = (root / "up.log").open("ab")
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Service:
        try:
            self._start("-m", "tests.e2e.agent_server", str(self.agent_port))
            self.up = self._start("-m", "app.cli.main", "up")
            self.key = self._hone("keys", "create", "e2e").strip()
            self.client = OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=self.key, timeout=60)
            self._await(lambda: httpx.get(f"http://127.0.0.1:{self.port}/healthz").status_code == 200, START_S)
            self._await(lambda: httpx.get(f"{self.agent_url}/seen").status_code == 200, START_S)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._log.close()
        if error is not None:
            for log in sorted((self.data / "logs").glob("*.log")):
                sys.stderr.write(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}\n")

    @property
    def agent_url(self) -> str:
        return f"http://127.0.0.1:{self.agent_port}"

    def seen(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{self.agent_url}/seen").json()
        return answer

    def create_job(
        self,
        model: str,
        *,
        steps: int = 3,
        short: bool = False,
        tool_url: str | None = None,
        training_file: str | None = None,
        **overrides: Any,
    ) -> Any:
        """Upload two small files and create a job of `steps` steps of 4 rows × 4 rollouts."""
        train = training_file or self.upload("train.jsonl", _jsonl([row(index) for index in range(12)]))
        valid = self.upload("valid.jsonl", _jsonl([row(index) for index in range(6)]))
        url = tool_url or f"{self.agent_url}/lookup"
        headers = {"Authorization": TOKEN}
        hyperparameters = {
            "n_epochs": max(1, steps // 3),
            "batch_size": 4,
            "eval_interval": 2,
            "compute_multiplier": 0.5,
        }
        grader = {"type": "endpoint", "name": "shop", "url": f"{self.agent_url}/grade", "headers": headers}
        common = {"grader": grader, "max_episode_steps": 3, "hyperparameters": hyperparameters}
        hone = {"max_tokens_per_turn": 48, "learning_rate": 1e-3, **overrides.pop("hone", {})}
        base = {"model": model, "training_file": train, "validation_file": valid, "suffix": "e2e", "seed": 7}
        tool = {"name": "lookup", "headers": headers}
        if short:
            rft = {**common, "tools": [{**tool, "url": url}]}
            return self.client.fine_tuning.jobs.create(
                **base, method="rft", extra_body={"rft": rft, "hone": hone}, **overrides
            )
        method = {
            "type": "reinforcement",
            "reinforcement": {**common, "tools": [{**tool, "server_url": url}]},
        }
        return self.client.fine_tuning.jobs.create(**base, method=method, extra_body={"hone": hone}, **overrides)

    def wait(self, job_id: str, timeout_s: float = 240.0) -> Any:
        """The job once it has ended."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            job = self.client.fine_tuning.jobs.retrieve(job_id)
            if job.status in ("succeeded", "failed", "cancelled"):
                return job
            time.sleep(0.2)
        raise AssertionError(f"{job_id} did not end within {timeout_s} s: {job.to_json(warnings=False)}")

    def wait_until(self, job_id: str, condition: Any, timeout_s: float = 180.0) -> Any:
        """The job as soon as `condition(job)` holds; fails if it ends before."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            job = self.client.fine_tuning.jobs.retrieve(job_id)
            if condition(job):
                return job
            assert job.status not in ("succeeded", "failed", "cancelled"), job.to_json(warnings=False)
            time.sleep(0.05)
        raise AssertionError(f"{job_id}: {condition} did not come true: {job.to_json(warnings=False)}")

    def events(self, job_id: str) -> list[Any]:
        """Oldest first."""
        return list(reversed(list(self.client.fine_tuning.jobs.list_events(job_id, limit=100))))

    def rollouts(self, job_id: str) -> list[dict[str, Any]]:
        answer: Any = self.client.get(f"/fine_tuning/jobs/{job_id}/rollouts?limit=1000", cast_to=object)
        rows: list[dict[str, Any]] = answer["data"]
        return rows

    def processes(self, *needles: str) -> list[int]:
        """Ids of this installation's processes whose command line holds all of `needles`."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                mine = f"HONE_DATA_DIR={self.data}".encode() in (entry / "environ").read_bytes()
            except OSError:
                continue
            if mine and all(needle in line for needle in needles):
                found.append(int(entry.name))
        return sorted(found)

    def wait_gone(self, needle: str, timeout_s: float = 20.0) -> None:
        """Fails if a process of this installation with `needle` in its command line outlives the time."""
        deadline = time.monotonic() + timeout_s
        while left := self.processes(needle):
            assert time.monotonic() < deadline, f"{needle} still runs: {left}"
            time.sleep(0.1)

    def upload(self, name: str, data: bytes) -> str:
        return self.client.files.create(file=(name, data), purpose="fine-tune").id

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._processes.append(process)
        return process

    def _hone(self, *arguments: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "app.cli.main", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return result.stdout

    def _await(self, condition: Any, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert all(process.poll() is None for process in self._processes), "a process ended at start"
            try:
                if condition():
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError("not up in time")


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def row(index: int) -> dict[str, Any]:
    item = ITEMS[index % len(ITEMS)]
    return {"messages": question(item), "tools": [LOOKUP], "parallel_tool_calls": False, "wanted": item, "n": index}
