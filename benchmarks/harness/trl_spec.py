"""What `trl_agent` is asked and what it answers: without torch, for the process that starts it.

Does not cover: doing it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spec:
    """What both sides share. `group` rollouts for each of `batch` rows a step; `micro` rows a forward pass here."""

    model: str
    rows: list[dict[str, Any]]
    steps: int
    batch: int
    group: int
    micro: int
    turns: int
    max_tokens: int
    learning_rate: float
    lora_rank: int
    lora_targets: list[str]
    dtype: str
    threads: int
    tool_url: str
    seed: int


@dataclass(frozen=True)
class Result:
    """`seconds` from the start of the loop to the end of its last step, without loading; `reward` over all rollouts."""

    seconds: float
    rollouts: int
    tokens: int
    reward: float
    step_seconds: list[float]
    same_prompt_tokens: bool
