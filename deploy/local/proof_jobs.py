"""The client's side of the proof: small jobs over the `openai` client, and what must be true of each at its end.

Does not cover: what is done to them meanwhile (`prove`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openai import OpenAI

from deploy.local.program import TopologyFailed
from tests.e2e.agent_server import TOKEN
from tests.e2e.service import row

BATCHES = (4, 6)  # rows a step, in turns; four rollouts each
TRAIN_ROWS, VALID_ROWS = 12, 2


class ProofFailed(TopologyFailed):
    """Something that must hold does not."""


def require(holds: object, message: str) -> None:
    if not holds:
        raise ProofFailed(message)


@dataclass(frozen=True)
class Sum:
    """What the jobs left, once each of them is right."""

    resumed: int  # attempts beyond the first
    rollouts: int
    checkpoints: int


class Jobs:
    """`model` is in the catalogue of the service; tool and grader are at `agent_url` (tests.e2e.agent_server)."""

    def __init__(self, base_url: str, key: str, model: str, agent_url: str) -> None:
        self.client = OpenAI(base_url=base_url, api_key=key, timeout=60, max_retries=5)
        self.model, self.agent_url = model, agent_url
        self.steps: dict[str, int] = {}  # by job, as asked for

    def create(self, count: int) -> None:
        train, valid = self._upload(TRAIN_ROWS), self._upload(VALID_ROWS)
        for number in range(count):
            batch = BATCHES[number % len(BATCHES)]
            job: Any = self.client.fine_tuning.jobs.create(
                model=self.model,
                training_file=train,
                validation_file=valid,
                suffix=f"topology-{number}",
                seed=number,
                method=self._method(batch),
                extra_body={"hone": {"max_tokens_per_turn": 48, "max_staleness": 0, "on_no_signal": "continue"}},
            )
            self.steps[job.id] = TRAIN_ROWS // batch

    def all(self) -> Sequence[Any]:
        return [job for job in self.client.fine_tuning.jobs.list(limit=100) if job.id in self.steps]

    def unfinished(self) -> Sequence[Any]:
        """Raises ProofFailed as soon as one has failed: nothing mends that."""
        found = self.all()
        for job in found:
            require(job.status not in ("failed", "cancelled"), f"{job.id} is {job.status}: {job.error}")
        return [job for job in found if job.status != "succeeded"]

    def resumed_from(self, job_id: str) -> list[int]:
        """The steps that its later attempts went on from."""
        text = "Fine-tuning job resumed from step "
        messages = [event.message for event in self.client.fine_tuning.jobs.list_events(job_id, limit=100)]
        return [int(message.removeprefix(text)) for message in messages if message.startswith(text)]

    def check(self) -> Sum:
        """Every job succeeded, its ledger sums up, each step counts once, each checkpoint stands once."""
        found = self.all()
        require(len(found) == len(self.steps), f"{len(self.steps)} jobs were created, {len(found)} are listed")
        rollouts = checkpoints = 0
        for job in found:
            require(job.status == "succeeded", f"{job.id} is {job.status}: {job.error}")
            rollouts += self._check_ledger(job)
            listed = list(self.client.fine_tuning.jobs.checkpoints.list(job.id))
            steps = [checkpoint.step_number for checkpoint in listed]
            wanted = list(range(self.steps[job.id], 0, -1))
            require(steps == wanted, f"{job.id}: checkpoints of the steps {steps}, expected {wanted}")
            names = {checkpoint.fine_tuned_model_checkpoint for checkpoint in listed}
            require(len(names) == len(listed), f"{job.id}: two checkpoints have one name")
            checkpoints += len(listed)
        return Sum(sum(job.hone["attempt"] - 1 for job in found), rollouts, checkpoints)

    def _check_ledger(self, job: Any) -> int:
        answer: Any = self.client.get(f"/fine_tuning/jobs/{job.id}/rollouts?limit=1000", cast_to=object)
        rows = answer["data"]
        states = Counter(each["state"] for each in rows)
        started = int(job.hone["rollouts"]["started"])
        require(len(rows) == started, f"{job.id}: {started} rollouts were started, {len(rows)} are in the ledger")
        require(not states["started"], f"{job.id} has ended and {states['started']} rollouts have not")
        attempts: dict[int, set[int]] = {}
        for each in rows:
            if each["state"] == "trained":
                attempts.setdefault(each["step"], set()).add(each["attempt"])
        twice = [step for step, by in attempts.items() if len(by) > 1]
        require(not twice, f"{job.id}: the steps {twice} count rollouts of two attempts")
        return started

    def _upload(self, rows: int) -> str:
        text = "\n".join(json.dumps(row(index)) for index in range(rows))
        return self.client.files.create(file=(f"rows-{rows}.jsonl", text.encode()), purpose="fine-tune").id

    def _method(self, batch: int) -> Any:
        headers = {"Authorization": TOKEN}
        return {
            "type": "reinforcement",
            "reinforcement": {
                "grader": {"type": "endpoint", "name": "shop", "url": f"{self.agent_url}/grade", "headers": headers},
                "tools": [{"name": "lookup", "server_url": f"{self.agent_url}/lookup", "headers": headers}],
                "max_episode_steps": 3,
                "hyperparameters": {
                    "n_epochs": 1, "batch_size": batch, "eval_interval": 1, "compute_multiplier": 0.5,
                },
            },
        }  # fmt: skip
