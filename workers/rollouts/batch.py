"""From ended groups to a training batch: leave-one-out advantages, which groups teach, which rollouts are kept.

Does not cover: the file (`workers.batch`) and the loss (`workers.trainer`). Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from workers.batch import TrainingRow
from workers.rollouts.types import Ended, Group

EQUAL = 1e-9  # rewards closer than this are the same: a float judge must not fake a signal


class Verdict(StrEnum):
    """What a finished group is good for."""

    TRAINABLE = "trainable"  # rewards differ
    NO_SIGNAL = "no_signal"  # every survivor has the same reward
    DROPPED = "dropped"  # too few siblings survived infrastructure faults


def judge(group: Group, group_size: int) -> Verdict:
    """A group is viable with at least half of its siblings, and at least two."""
    rewards = [member.reward for member in group.graded]
    if len(rewards) < max(2, math.ceil(group_size / 2)):
        return Verdict.DROPPED
    return Verdict.NO_SIGNAL if max(rewards) - min(rewards) <= EQUAL else Verdict.TRAINABLE


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """Each reward minus the mean of the *others*; the result sums to 0. Needs two rewards or more.

    Source: the RLOO baseline (Ahmadian et al. 2024). Not divided by the standard deviation, which up-weights groups
    that are nearly solved (Liu et al. 2025, "Dr. GRPO").
    """
    total, others = math.fsum(rewards), len(rewards) - 1
    return [reward - (total - reward) / others for reward in rewards]


@dataclass(frozen=True)
class Selected:
    """What goes into the batch file, and what each graded rollout's advantage is."""

    rows: list[TrainingRow]
    chosen: list[Ended]
    left_out: list[Ended]
    advantages: dict[str, float]


def select(groups: Sequence[Group], max_rollouts: int | None) -> Selected:
    """Rollouts of trainable groups; beyond `max_rollouts`, those with the largest |advantage| are kept.

    A rollout is a row for each segment of its call tree that has sampled tokens, all with its advantage. One whose
    advantage is exactly 0, or that sampled nothing, moves no weight and is left out.
    """
    scored: list[tuple[float, Ended]] = []
    for group in groups:
        members = group.graded
        scored += zip(leave_one_out([member.reward for member in members]), members, strict=True)
    ranked = sorted(
        (pair for pair in scored if abs(pair[0]) > EQUAL and pair[1].trajectory.completion_tokens > 0),
        key=lambda pair: -abs(pair[0]),
    )
    kept = ranked[: max_rollouts or len(ranked)]
    kept_ids = {ended.key.id for _, ended in kept}
    rows = [
        TrainingRow(
            ids=segment.ids,
            mask=segment.mask,
            log_probs=segment.log_probs,
            advantage=advantage,
            group=ended.key.group,
        )
        for advantage, ended in sorted(kept, key=lambda pair: (pair[1].key.group, pair[1].key.sample))
        for segment in ended.trajectory.segments
        if segment.sampled
    ]
    return Selected(
        rows=rows,
        chosen=[ended for _, ended in kept],
        left_out=[ended for _, ended in scored if ended.key.id not in kept_ids],
        advantages={ended.key.id: advantage for advantage, ended in scored},
    )
