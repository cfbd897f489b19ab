"""The call tree: parents, segments, and the check of what would be trained."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest

from workers.rollouts.calls import Call, CallTree, TokenDrift
from workers.rollouts.types import Trajectory


def say(tree: CallTree, *ids: int) -> Call:
    rates = [-0.5] * len(ids)
    prompt = tree.current.ids[:]
    return tree.record(prompt, ids, rates, model="m", version=1, sampler="s", finish_reason="stop", seconds=0.0)


def tree_of(prompt: Sequence[int]) -> CallTree:
    tree = CallTree()
    tree.restart(array("i", prompt))
    return tree


def test_turns_that_extend_the_ids_are_one_path() -> None:
    tree = tree_of([1, 2])
    say(tree, 3)
    tree.current.give([4])
    say(tree, 5, 6)
    assert [(call.parent, call.start, call.end) for call in tree.calls] == [(None, 2, 3), (0, 4, 6)]
    assert (len(tree.segments), list(tree.current.mask)) == (1, [0, 0, 1, 0, 1, 1])
    tree.verify()


def test_a_changed_history_is_a_root_and_one_that_repeats_a_path_is_a_branch() -> None:
    tree = tree_of([1, 2])
    say(tree, 3)
    tree.current.give([4])
    say(tree, 5)
    tree.restart(array("i", [1, 2, 3, 9]))  # begins as the first call ended
    say(tree, 6)
    tree.restart(array("i", [7]))
    say(tree, 8)
    assert [call.parent for call in tree.calls] == [None, 0, 0, None]
    assert [segment.parent for segment in tree.segments] == [None, 0, None]
    assert list(tree.segments[1].mask) == [0, 0, 0, 0, 1]  # the 3 is trained where it was sampled
    assert tree.sampled == sum(call.end - call.start for call in tree.calls)
    tree.verify()


def test_the_longest_prefix_is_the_parent() -> None:
    tree = tree_of([1])
    say(tree, 2)
    tree.current.give([3])
    say(tree, 4)
    tree.current.give([5])
    say(tree, 6)
    tree.restart(array("i", [1, 2, 3, 4, 9]))
    assert tree.current.parent == 1


def test_a_sampled_token_that_no_call_accounts_for_is_drift() -> None:
    tree = tree_of([1, 2])
    say(tree, 3)
    tree.current.take([4], [-1.0])
    with pytest.raises(TokenDrift, match="no call sampled"):
        tree.verify()


def test_a_prompt_other_than_the_one_that_was_sent_is_drift() -> None:
    tree = tree_of([1, 2])
    say(tree, 3)
    tree.current.give([4])
    tree.record(
        array("i", [1, 2, 3, 5]), [6], [-1.0], model="m", version=1, sampler=None, finish_reason="stop", seconds=0
    )
    with pytest.raises(TokenDrift, match=r"call 1: the prompt"):
        tree.verify()


def test_two_thousand_tokens_weigh_less_than_twenty_kibibytes() -> None:
    trajectory = Trajectory()
    for _ in range(20):
        trajectory.tree.current.give(range(50))
        say(trajectory.tree, *range(50))
    segment = trajectory.tree.current
    assert len(segment.ids) == 2000
    sizes = segment.ids.__sizeof__() + segment.mask.__sizeof__() + segment.log_probs.__sizeof__()
    assert sizes < 21_000
