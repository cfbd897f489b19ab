"""Numbers of a step and of a validation pass, under the names clients know (contract §8.3, with extras).

Does not cover: the update's own diagnostics, which the trainer reports. Pure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from app.core.states import RolloutState
from workers.rollouts.batch import Verdict
from workers.rollouts.pool import StepRollouts
from workers.rollouts.types import Ended


def mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return math.fsum(found) / len(found) if found else None


def summary(rollouts: Sequence[Ended]) -> dict[str, Any]:
    """Reward with its standard error, and what the rollouts cost; only graded ones count."""
    graded = [ended for ended in rollouts if ended.grade is not None]
    rewards = [ended.reward for ended in graded]
    calls = sum(e.trajectory.attempted_calls for e in graded)
    invalid = sum(e.trajectory.invalid_calls for e in graded)
    return {
        "n": len(graded),
        "discarded": len(rollouts) - len(graded),
        "reward_mean": mean(rewards),
        "reward_std": statistics.pstdev(rewards) if rewards else None,
        "reward_se": statistics.stdev(rewards) / math.sqrt(len(rewards)) if len(rewards) > 1 else None,
        "tool_calls_mean": mean(len(e.trajectory.tools) for e in graded),
        "invalid_calls_mean": mean(e.trajectory.invalid_calls for e in graded),
        "tool_error_rate": invalid / calls if calls else 0.0,
        "completion_tokens_mean": mean(e.trajectory.completion_tokens for e in graded),
        "turns_mean": mean(len(e.trajectory.turns) for e in graded),
        "new_roots": sum(e.trajectory.new_roots for e in graded),
        "truncated_share": mean(float(e.trajectory.truncated) for e in graded),
    }


def quantile(values: Sequence[float], share: float) -> float | None:
    """Nearest-rank quantile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else None


def tools(rollouts: Sequence[Ended], split: str) -> list[dict[str, Any]]:
    """Per tool: calls per rollout, errors, retries, latency."""
    by_name: dict[str, list[Any]] = {}
    for ended in rollouts:
        for record in ended.trajectory.tools:
            by_name.setdefault(record.name, []).append(record)
    return [
        {
            "name": name,
            f"{split}_calls_per_rollout": len(records) / max(1, len(rollouts)),
            "errors_count": sum(record.is_error for record in records),
            "retries_count": sum(max(0, record.attempts - 1) for record in records),
            "latency_p50_s": quantile([record.seconds for record in records], 0.5),
            "latency_p95_s": quantile([record.seconds for record in records], 0.95),
        }
        for name, records in sorted(by_name.items())
    ]


def step_data(step: int, total: int, rollouts: StepRollouts) -> dict[str, Any]:
    """The sampling side of a step's metrics event."""
    members = [member for group, _ in rollouts.groups for member in group.members]
    graded = [member for member in members if member.grade is not None]
    quiet = [member for member in graded if not member.trajectory.tools]
    rewards = [member.reward for member in graded]
    facts = summary(members)
    counts = {verdict: len(rollouts.of(verdict)) for verdict in Verdict}
    everything = max(1, len(rollouts.groups))
    solved = sum(min(m.reward for m in group.graded) >= 1.0 for group in rollouts.of(Verdict.NO_SIGNAL))
    failed = {
        state.value: sum(member.state is state for member in members)
        for state in RolloutState
        if any(member.state is state for member in members)
    }
    return {
        "step": step,
        "total_steps": total,
        "train_mean_reward": facts["reward_mean"],
        "completion_tokens_mean": facts["completion_tokens_mean"],
        "tool_calls_mean": facts["tool_calls_mean"],
        "invalid_calls_mean": facts["invalid_calls_mean"],
        "mean_unresponsive_rewards": facts["discarded"] / max(1, len(members)),
        "scores": {"train_reward_mean": facts["reward_mean"]},
        "reward": {
            "min": min(rewards, default=None),
            "p10": quantile(rewards, 0.1),
            "p50": quantile(rewards, 0.5),
            "p90": quantile(rewards, 0.9),
            "max": max(rewards, default=None),
            "std": facts["reward_std"],
        },
        "groups": {
            "size": len(rollouts.groups[0][0].members) if rollouts.groups else 0,
            "total": len(rollouts.groups),
            "mixed": counts[Verdict.TRAINABLE] / everything,
            "solved": solved / everything,
            "constant": counts[Verdict.NO_SIGNAL] / everything,
            "dropped": counts[Verdict.DROPPED] / everything,
        },
        "rollouts": {
            "started": len(members),
            "graded": len(graded),
            "truncated": sum(m.trajectory.truncated for m in graded),
            "turns_mean": facts["turns_mean"],
            "new_roots": facts["new_roots"],
            "bridge_breaks": sum(m.trajectory.bridge_breaks for m in graded),
            "token_drift": sum(m.trajectory.drifted for m in members),
            "no_calls": {"share": len(quiet) / max(1, len(graded)), "reward_mean": mean(m.reward for m in quiet)},
            "discarded": failed,
        },
        "tools": tools(graded, "train"),
    }


def message(data: Mapping[str, Any]) -> str:
    """`Step N/M , train mean reward=x, full validation mean reward=y, …` as scripts read it (contract §8.2)."""
    parts = [f"Step {data['step']}/{data['total_steps']} "]
    if data.get("train_mean_reward") is not None:
        parts.append(f" train mean reward={data['train_mean_reward']:.4f}")
    if data.get("full_valid_mean_reward") is not None:
        parts.append(f" full validation mean reward={data['full_valid_mean_reward']:.4f}")
        parts.append(f" full validation mean parse error={data.get('full_valid_mean_parse_error', 0.0):.4f}")
    return ",".join(parts)
