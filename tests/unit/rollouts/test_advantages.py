"""What a group is worth and which of its rollouts are trained."""

from __future__ import annotations

import math
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.states import RolloutState
from tests.unit.rollouts.scripted import answered, ended, row
from workers.rollouts.batch import Verdict, judge, leave_one_out, select
from workers.rollouts.types import Group

rewards = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20)


def group(*scores: float | None, number: int = 1) -> Group:
    failed = RolloutState.TOOL_FAILED
    members = [ended(s, group=number, sample=i, state=failed if s is None else None) for i, s in enumerate(scores)]
    return Group(row(), number, 0, members)


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [
        ((1.0, 0.0, 0.0, 0.0), Verdict.TRAINABLE),
        ((1.0, 0.0, None, None), Verdict.TRAINABLE),
        ((1.0, None, None, None), Verdict.DROPPED),
        ((1.0, 0.0, None, None, None), Verdict.DROPPED),  # half of five is three
        ((1.0, None), Verdict.DROPPED),  # one alone has nobody to be compared with
        ((None, None), Verdict.DROPPED),
        ((0.5, 0.5, 0.5, None), Verdict.NO_SIGNAL),
        ((0.3, 0.1 + 0.2, 0.3), Verdict.NO_SIGNAL),  # float noise is no signal
        ((0.3, 0.3 + 1e-6, 0.3), Verdict.TRAINABLE),
    ],
)
def test_a_group_needs_half_its_siblings_and_different_rewards(
    scores: tuple[float | None, ...], verdict: Verdict
) -> None:
    assert judge(group(*scores), len(scores)) is verdict


@given(rewards)
def test_advantages_of_a_group_sum_to_zero(scores: list[float]) -> None:
    assert math.fsum(leave_one_out(scores)) == pytest.approx(0, abs=1e-9 * (1 + max(map(abs, scores))) * len(scores))


@given(rewards)
def test_an_advantage_is_the_reward_minus_the_mean_of_the_others(scores: list[float]) -> None:
    for index, advantage in enumerate(leave_one_out(scores)):
        others = scores[:index] + scores[index + 1 :]
        assert advantage == pytest.approx(scores[index] - math.fsum(others) / len(others), abs=1e-9)


def test_the_spread_of_a_group_is_not_divided_away() -> None:
    assert leave_one_out([1.0, 0.0]) == [1.0, -1.0]
    assert leave_one_out([0.1, 0.0]) == pytest.approx([0.1, -0.1])


def test_without_a_limit_every_rollout_with_an_advantage_is_trained_in_order() -> None:
    chosen = select([group(0.0, 1.0, number=2), group(1.0, 0.0, number=1)], None)
    assert [(line.group, line.advantage) for line in chosen.rows] == [(1, 1.0), (1, -1.0), (2, -1.0), (2, 1.0)]
    assert chosen.left_out == []


def test_a_limit_keeps_the_largest_advantages_and_reports_the_rest() -> None:
    chosen = select([group(1.0, 0.0, 0.0, number=1), group(0.4, 0.0, number=2)], 2)
    assert {ended.key.id for ended in chosen.chosen} == {"g1s0", "g1s1"}
    assert {ended.key.id for ended in chosen.left_out} == {"g1s2", "g2s0", "g2s1"}
    assert [line.advantage for line in chosen.rows] == [1.0, -0.5]
    assert chosen.advantages["g2s0"] == 0.4  # known also of what was left out


def test_a_rollout_without_advantage_moves_nothing_and_is_left_out() -> None:
    chosen = select([group(0.0, 0.5, 1.0)], None)
    assert [line.advantage for line in chosen.rows] == [-0.75, 0.75]
    assert [ended.key.id for ended in chosen.left_out] == ["g1s1"]


def test_a_rollout_that_sampled_nothing_is_left_out_but_counts_as_a_sibling() -> None:
    members = [ended(1.0, sample=0), ended(0.0, sample=1, tokens=0)]
    chosen = select([Group(row(), 1, 0, members)], None)
    assert [line.advantage for line in chosen.rows] == [1.0]
    assert [ended.key.sample for ended in chosen.left_out] == [1]


def test_discarded_siblings_take_no_part_in_the_mean() -> None:
    chosen = select([group(1.0, None, 0.0, None)], None)
    assert [line.advantage for line in chosen.rows] == [1.0, -1.0]
    assert chosen.advantages.keys() == {"g1s0", "g1s2"}


def test_a_row_of_the_batch_is_the_trajectory_itself() -> None:
    one, other = ended(1.0, sample=0, tokens=3), ended(0.0, sample=1)
    (line, _) = select([Group(row(), 1, 0, [one, other])], None).rows
    assert (line.ids, line.mask, line.log_probs) == (one.trajectory.ids, one.trajectory.mask, one.trajectory.log_probs)


def test_a_rollout_with_new_roots_is_a_row_for_each_segment_that_was_sampled() -> None:
    one, other = ended(1.0, sample=0), ended(0.0, sample=1)
    tree = one.trajectory.tree
    tree.restart(array("i", [7, 8]))
    answered(one.trajectory, [], [9])
    tree.restart(array("i", [5]))  # the episode ended before anything was sampled here
    lines = select([Group(row(), 1, 0, [one, other])], None).rows
    assert [(list(line.ids), list(line.mask)) for line in lines[:2]] == [([1, 1, 1], [0, 1, 1]), ([7, 8, 9], [0, 0, 1])]
    assert [(line.advantage, line.group) for line in lines] == [(1.0, 1), (1.0, 1), (-1.0, 1)]


def test_nothing_to_train_is_an_empty_selection() -> None:
    assert select([], 5).rows == []


@given(st.lists(rewards, max_size=4), st.none() | st.integers(1, 30))
def test_every_graded_rollout_is_either_chosen_or_left_out(groups: list[list[float]], limit: int | None) -> None:
    chosen = select([group(*scores, number=n) for n, scores in enumerate(groups)], limit)
    found = [ended.key.id for ended in (*chosen.chosen, *chosen.left_out)]
    assert len(found) == len(set(found)) == sum(map(len, groups)) == len(chosen.advantages)
    assert len(chosen.rows) == len(chosen.chosen) <= (limit or len(found))
