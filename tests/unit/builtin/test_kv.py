"""The prefix tree gives back what was put in, splits without copying, and forgets the oldest first."""

import numpy as np
import torch

from workers.sampler.builtin.kv import KVShape, PrefixTree, SlotPool

SHAPE = KVShape(layers=2, heads=1, dim=4, dtype=torch.float32)


def kv(ids: list[int]) -> torch.Tensor:
    """A key that names its token: [layers, heads, tokens, dim]."""
    return torch.tensor(ids, dtype=torch.float32)[None, None, :, None].expand(2, 1, -1, 4).clone()


def put(tree: PrefixTree, ids: list[int], start: int = 0) -> None:
    tree.insert(np.array(ids), start, kv(ids[start:]), kv(ids[start:]))


def spelled(tree: PrefixTree, ids: list[int]) -> list[int]:
    return [int(v) for s in tree.match(np.array(ids), len(ids)) for v in s.keys[0, 0, :, 0]]


def test_a_text_is_found_as_far_as_it_is_known() -> None:
    tree = PrefixTree(SHAPE)
    put(tree, [1, 2, 3, 4])
    assert spelled(tree, [1, 2, 3, 4, 5]) == [1, 2, 3, 4]
    assert spelled(tree, [1, 2, 9]) == [1, 2]
    assert spelled(tree, [7]) == []


def test_a_branch_shares_its_beginning() -> None:
    tree = PrefixTree(SHAPE)
    put(tree, [1, 2, 3, 4])
    put(tree, [1, 2, 5, 6], start=1)
    assert spelled(tree, [1, 2, 5, 6]) == [1, 2, 5, 6]
    assert tree.tokens == 6
    first, second = (tree.match(np.array([1, 2, x]), 3)[0] for x in (3, 5))
    assert first is second


def test_a_match_stops_at_the_limit() -> None:
    tree = PrefixTree(SHAPE)
    put(tree, [1, 2, 3, 4])
    assert tree.match(np.array([1, 2, 3, 4]), 3)[-1].stop == 3


def test_the_least_recently_used_leaf_goes_first() -> None:
    tree = PrefixTree(SHAPE)
    put(tree, [1, 2, 3])
    put(tree, [1, 2, 4])
    spelled(tree, [1, 2, 3])
    assert tree.evict(1) == 1
    assert spelled(tree, [1, 2, 4]) == [1, 2]
    assert spelled(tree, [1, 2, 3]) == [1, 2, 3]
    assert tree.evict(100) == 3
    assert tree.tokens == 0


def test_a_text_whose_beginning_was_evicted_is_not_remembered_with_a_hole() -> None:
    tree = PrefixTree(SHAPE)
    put(tree, [1, 2, 3, 4], start=2)
    assert tree.tokens == 0


def test_a_pool_keeps_tails_when_it_grows_and_shifts_them_both_ways() -> None:
    pool = SlotPool(SHAPE, slots=1, capacity=4)
    pool.keys[:, 0, :, :3] = kv([1, 2, 3])
    pool.fit(3, 10, [3])
    assert (pool.slots, pool.capacity) == (4, 16)
    assert pool.keys[0, 0, 0, :3, 0].tolist() == [1, 2, 3]
    pool.shift(0, -1, 3)
    assert pool.keys[0, 0, 0, :2, 0].tolist() == [2, 3]
    pool.shift(0, 2, 2)
    assert pool.keys[0, 0, 0, 2:4, 0].tolist() == [2, 3]
    pool.move(0, 2, 4)
    assert pool.keys[0, 2, 0, 2:4, 0].tolist() == [2, 3]
