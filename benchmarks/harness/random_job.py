"""Jobs on models of random weights, without tools: what a machine does, not what a model learns.

Does not cover: the reward, which means nothing (`agent_task.score_sample`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.models.catalogue import BaseModel
from benchmarks.harness import ledger
from benchmarks.harness.service import JobSpec, Service

LIMIT_S = 7200.0
WORDS = ("red", "blue", "lamp", "chair", "book", "cup", "hat", "scarf", "price", "item", "answer", "tool")


@dataclass(frozen=True)
class Plan:
    """`batch` prompts × `group` rollouts a step, at most `tokens` sampled tokens each, LoRA of `rank`."""

    steps: int
    batch: int
    group: int
    tokens: int
    rank: int


def rows(count: int, words: int = 40) -> list[dict[str, Any]]:
    """Prompts that share nothing but the template."""
    rng = random.Random(count)
    return [{"messages": [{"role": "user", "content": " ".join(rng.choices(WORDS, k=words))}]} for _ in range(count)]


def run(
    service: Service, model: BaseModel, tool_url: str, plans: Sequence[Plan], *, staleness: int = 1
) -> list[ledger.Training]:
    """All jobs at once; what each did."""
    jobs = []
    for seed, plan in enumerate(plans):
        train = rows(plan.steps * plan.batch)
        spec = JobSpec(
            model=model.id, train=train, valid=train[:1], steps=plan.steps, batch=plan.batch, group=plan.group,
            max_episode_steps=1, tool_url=tool_url, tools=(), seed=seed,
            hone={
                "max_tokens_per_turn": plan.tokens, "max_tokens_per_episode": plan.tokens, "lora_rank": plan.rank,
                "learning_rate": 1e-6, "max_staleness": staleness, "on_no_signal": "continue",
            },
        )  # fmt: skip
        jobs.append(service.create(spec))
    service.wait(jobs, LIMIT_S)
    return [ledger.training(service.database, job) for job in jobs]
