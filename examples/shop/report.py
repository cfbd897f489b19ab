"""Before and after, for a reader: the table, the comparison with the job's own validation, and three conversations.

Does not cover: where the numbers come from (`examples.shop.agent`, the job's metrics events).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from examples.shop.agent import Episode, Measured

TRANSCRIPTS = 3


@dataclass(frozen=True)
class Both:
    """One model, measured twice: as it samples and at its most likely."""

    sampled: Measured
    greedy: Measured

    def as_dict(self) -> dict[str, float]:
        return {
            "reward_mean": round(self.sampled.reward_mean, 4),
            "reward_se": round(self.sampled.reward_se, 4),
            "greedy_reward_mean": round(self.greedy.reward_mean, 4),
            "tool_calls_mean": round(self.sampled.tool_calls_mean, 4),
            "tool_error_rate": round(self.sampled.tool_error_rate, 4),
            "invented_rate": round(self.sampled.invented_rate, 4),
            "completion_tokens_mean": round(self.sampled.completion_tokens_mean, 2),
            "n": self.sampled.n,
        }


def table(before: Both, after: Both) -> str:
    """Held-out rows, base model against tuned model."""
    old, new = before.sampled, after.sampled
    lines = [
        ("", "before", "after"),
        ("reward, sampled", with_error(old), with_error(new)),
        ("reward, greedy", f"{before.greedy.reward_mean:.3f}", f"{after.greedy.reward_mean:.3f}"),
        ("tool calls per episode", f"{old.tool_calls_mean:.2f}", f"{new.tool_calls_mean:.2f}"),
        ("invalid calls", f"{old.tool_error_rate:.1%}", f"{new.tool_error_rate:.1%}"),
        ("invented answers", f"{old.invented_rate:.1%}", f"{new.invented_rate:.1%}"),
        ("model tokens per episode", f"{old.completion_tokens_mean:.1f}", f"{new.completion_tokens_mean:.1f}"),
        ("episodes, sampled + greedy", f"{old.n} + {before.greedy.n}", f"{new.n} + {after.greedy.n}"),
    ]
    rows = [f"  {name:<28}{left:>16}{right:>16}" for name, left, right in lines]
    return "\n".join([rows[0], "  " + "─" * 60, *rows[1:]])


def with_error(measured: Measured) -> str:
    return f"{measured.reward_mean:.3f} ± {measured.reward_se:.3f}"


def compare(label: str, own: Measured, valid: Mapping[str, Any] | None) -> tuple[bool | None, str]:
    """Whether the job's validation saw the same reward, within two standard errors of the difference."""
    if valid is None:
        return None, f"  {label}: the job reported no validation"
    theirs, error = float(valid["reward_mean"]), float(valid["reward_se"])
    bound = 2 * math.hypot(own.reward_se, error)
    gap = abs(own.reward_mean - theirs)
    verdict = "within" if gap <= bound else "OUTSIDE"
    return gap <= bound, (
        f"  {label}: here {with_error(own)}, the job {theirs:.3f} ± {error:.3f} (n={valid['n']}): "
        f"{gap:.3f} apart, {verdict} two standard errors ({bound:.3f})"
    )


def pick(before: Sequence[Episode], after: Sequence[Episode]) -> list[tuple[Episode, Episode]]:
    """Three held-out questions with both episodes, those with the largest gain first and one question once."""
    by_gain = sorted(zip(before, after, strict=True), key=lambda pair: pair[0].reward - pair[1].reward)
    chosen: dict[str, tuple[Episode, Episode]] = {}
    for pair in by_gain:
        chosen.setdefault(pair[0].row["messages"][-1]["content"], pair)
    return list(chosen.values())[:TRANSCRIPTS]


def transcript(episode: Episode) -> str:
    """The messages after the question, one line each."""
    lines = []
    for message in episode.written:
        for call in message.get("tool_calls", []):
            lines.append(f"{call['function']['name']}({call['function']['arguments']})")
        text = " ".join(str(message.get("content") or "").split())
        if text:
            lines.append(f"→ {text}" if message["role"] == "tool" else f"“{text}”")
    return "\n".join(f"      {line}" for line in [*lines, f"reward {episode.reward:.2f}"])


def conversations(before: Both, after: Both) -> str:
    blocks = []
    for old, new in pick(before.sampled.episodes, after.sampled.episodes):
        question = old.row["messages"][-1]["content"]
        blocks.append(f"  {question}\n    before\n{transcript(old)}\n    after\n{transcript(new)}")
    return "\n\n".join(blocks)
