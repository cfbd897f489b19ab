"""The numbers that a run's rules look at: steps and validation passes so far, and the thresholds they are held against.

Does not cover: the rules (`workers.callouts`) and when one may speak (`workers.monitor`). What is kept is bounded: the
first steps with an update, and a window of the latest.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DEPTH = re.compile(r"mismatch_kl_depth_(\d+)")


@dataclass(frozen=True)
class Thresholds:
    """Shares are of 1. `early`, `recent`: numbers of steps whose median stands for the start and for now."""

    importance_range: tuple[float, float] | None = (0.5, 2.0)  # the plan's: outside, tokens are masked
    max_staleness: int = 1  # the plan's
    uses_tools: bool = True

    early: int = 5
    recent: int = 3
    mismatch_growth: float = 3.0  # against its own early median; healthy runs stay flat
    mismatch_spread: float = 1.5  # and against the largest of the early ones: bf16 alone gives 1 to 4e-3
    mismatch_floor: float = 1e-4  # below it a growth is noise of the arithmetic
    depth_growth: float = 3.0  # late turns against early ones
    masked_tokens: float = 0.05
    masked_sequences: float = 0.1
    masked_by_age: float = 0.02  # of tokens or sequences, when batches are as old as they may be
    entropy_left: float = 0.4  # of the start
    entropy_jump: float = 2.0  # against the median of the steps before
    entropy_floor: float = 0.05  # nats; below it a rise means nothing
    clipped: float = 0.1
    truncated: float = 0.1
    mixed: float = 0.3  # groups whose rewards differ
    errored: float = 0.05
    high_score: float = 0.7
    without_calls: float = 0.2  # of the rollouts
    queued: float = 0.2  # of the step's time
    slow: float = 3.0  # times the median step
    slow_history: int = 5  # steps that make a median
    repeated: int = 20  # the same rejection in a row
    refused: float = 0.5  # of a tool's calls
    enough: int = 20  # rollouts or calls, below which a share says nothing


def number(data: Mapping[str, Any], *path: str) -> float | None:
    """The finite number at a path of nested objects; None for everything else."""
    value: Any = data
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the rules need of a step's `data`; None or empty where it was not measured."""

    step: int
    seconds: float | None
    reward: float | None
    reward_min: float | None
    reward_max: float | None
    graded: float
    started: float
    truncated: float
    tool_calls: float | None
    no_calls: float | None  # share of rollouts that called no tool
    no_calls_reward: float | None
    discarded: Mapping[str, int]  # by state
    groups: Mapping[str, float]  # mixed, solved, constant, dropped: fractions
    policy: Mapping[str, float]
    by_depth: Mapping[int, float]  # mismatch KL by turn, from 0
    shares: Mapping[str, float]
    bound: str
    tools: Mapping[str, tuple[float, float]]  # calls, errors
    rejection: tuple[str, int] | None  # the most frequent error and its count

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Facts:
        def numbers(*path: str) -> dict[str, float]:
            found: Any = data
            for name in path:
                found = found.get(name) or {}
            return {name: value for name in found if (value := number(found, name)) is not None}

        rollouts = data.get("rollouts") or {}
        graded = number(rollouts, "graded") or 0.0
        policy = numbers("policy")
        top = rollouts.get("top_error")
        return cls(
            step=int(data["step"]),
            seconds=number(data, "timing", "step", "full_iteration"),
            reward=number(data, "train_mean_reward"),
            reward_min=number(data, "reward", "min"),
            reward_max=number(data, "reward", "max"),
            graded=graded,
            started=number(rollouts, "started") or 0.0,
            truncated=number(rollouts, "truncated") or 0.0,
            tool_calls=number(data, "tool_calls_mean"),
            no_calls=number(rollouts, "no_calls", "share"),
            no_calls_reward=number(rollouts, "no_calls", "reward_mean"),
            discarded={state: int(count) for state, count in numbers("rollouts", "discarded").items()},
            groups=numbers("groups"),
            policy=policy,
            by_depth={int(match[1]): value for name, value in policy.items() if (match := DEPTH.fullmatch(name))},
            shares=numbers("diagnosis", "shares"),
            bound=str((data.get("diagnosis") or {}).get("bound", "")),
            tools={
                tool["name"]: (
                    (number(tool, "train_calls_per_rollout") or 0.0) * graded,
                    number(tool, "errors_count") or 0.0,
                )
                for tool in data.get("tools") or ()
            },
            rejection=(top["message"], int(top["count"])) if top else None,
        )


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A validation pass. `error`: standard error of `reward`; `trained`: mean training reward since the pass before."""

    step: int
    reward: float
    error: float = 0.0
    trained: float | None = None


@dataclass(frozen=True)
class Seen:
    """Everything up to now, oldest first. `start`: the first steps with an update; `steps`: the window up to now."""

    start: Sequence[Facts]
    steps: Sequence[Facts]
    evaluations: Sequence[Evaluated]
    at: Thresholds

    @property
    def last(self) -> Facts:
        return self.steps[-1]

    def recent(self) -> Sequence[Facts]:
        """The latest steps, `recent` of them; fewer at the start."""
        return self.steps[-self.at.recent :]

    def first(self, name: str) -> list[float]:
        """A number of the update at the start of the job."""
        return [facts.policy[name] for facts in self.start if name in facts.policy]

    def policy(self, name: str) -> list[float]:
        """A number of the update, over the steps that have it; empty when the latest step has none."""
        if name not in self.last.policy:
            return []
        return [facts.policy[name] for facts in self.steps if name in facts.policy]

    def recent_mean(self, name: str) -> float:
        """Of a number of the update; 0 when the latest step has none."""
        return statistics.fmean(values) if (values := self.policy(name)[-self.at.recent :]) else 0.0


def median_step(steps: Sequence[Facts], at: Thresholds) -> float | None:
    """Seconds; None while too few steps are known."""
    known = [facts.seconds for facts in steps if facts.seconds]
    return statistics.median(known) if len(known) >= at.slow_history else None


def error_kind(error: str) -> str:
    """An error without its numbers and ids, so that the same fault of two rollouts is the same."""
    return re.sub(r"\w*\d\w*", "#", error)
