"""Where keys and values live: a radix tree of finished text per version, and the slots of the running sequences.

A tree segment is immutable and covers a run of tokens; a split is two views of the same memory. A running sequence
reads its shared beginning from segments and keeps the rest, its tail, in one slot of a `SlotPool`.
Does not cover: what is worth sharing in a step and who is admitted (`lane`).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class KVShape:
    layers: int
    heads: int
    dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.heads * self.dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Keys and values of the tokens at absolute positions `start` to `stop`: [layers, heads, stop - start, dim]."""

    start: int
    stop: int
    keys: Tensor
    values: Tensor


@dataclass(slots=True, eq=False)
class Node:
    ids: Ids
    segment: Segment
    parent: Node | None
    children: dict[int, Node] = field(default_factory=dict)
    used: int = 0


def common_prefix(a: Ids, b: Ids) -> int:
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    return int(different.argmax()) if n and different.any() else n


class PrefixTree:
    """The prefix cache of one weight version. Not thread-safe: only the engine's thread touches it."""

    def __init__(self, shape: KVShape) -> None:
        self.tokens = 0
        self._clock = itertools.count(1)
        empty = torch.empty(shape.layers, shape.heads, 0, shape.dim, dtype=shape.dtype)
        self._root = Node(np.empty(0, np.int64), Segment(0, 0, empty, empty), None)

    def walk(self, ids: Ids, limit: int) -> list[Segment]:
        """Whole segments that spell the beginning of `ids`, ending at or before position `limit`."""
        path: list[Segment] = []
        node, at = self._root, 0
        while at < limit:
            child = node.children.get(int(ids[at]))
            if child is None or at + len(child.ids) > limit:
                break
            if not np.array_equal(child.ids, ids[at : at + len(child.ids)]):
                break
            path.append(child.segment)
            node, at = child, at + len(child.ids)
        return path

    def match(self, ids: Ids, limit: int) -> list[Segment]:
        """As `walk`, but marks the path as used and splits a node that only begins like `ids`."""
        path: list[Segment] = []
        node, at, now = self._root, 0, next(self._clock)
        while at < limit:
            child = node.children.get(int(ids[at]))
            if child is None:
                break
            n = common_prefix(child.ids, ids[at:limit])
            if n == 0:
                break
            if n < len(child.ids):
                child = self._split(child, n)
            child.used = now
            path.append(child.segment)
            node, at = child, at + n
        return path

    def insert(self, ids: Ids, tail_start: int, keys: Tensor, values: Tensor) -> None:
        """Remember `ids`; keys and values hold positions `tail_start` on, and are copied as far as they are new."""
        node, at, now = self._root, 0, next(self._clock)
        while at < len(ids):
            child = node.children.get(int(ids[at]))
            if child is None:
                break
            n = common_prefix(child.ids, ids[at:])
            if n < len(child.ids):
                child = self._split(child, n)
            child.used = now
            node, at = child, at + n
        if at == len(ids) or at < tail_start:  # nothing new, or the beginning was evicted meanwhile
            return
        cut = slice(at - tail_start, len(ids) - tail_start)
        segment = Segment(at, len(ids), keys[:, :, cut].clone(), values[:, :, cut].clone())
        node.children[int(ids[at])] = Node(ids[at:].copy(), segment, node, used=now)
        self.tokens += len(ids) - at

    def evict(self, tokens: int) -> int:
        """Drop least recently used leaves until at least `tokens` are free or nothing is left; returns how many."""
        leaves = [(n.used, id(n), n) for n in self._leaves()]
        heapq.heapify(leaves)
        freed = 0
        while leaves and freed < tokens:
            _, _, node = heapq.heappop(leaves)
            parent = node.parent
            if parent is None:
                continue
            del parent.children[int(node.ids[0])]
            freed += len(node.ids)
            if not parent.children and parent.parent is not None:
                heapq.heappush(leaves, (parent.used, id(parent), parent))
        self.tokens -= freed
        return freed

    def clear(self) -> None:
        """Forget everything, now: nodes name their parents, and such cycles wait long for the collector."""
        stack = [self._root]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            node.parent = None
            node.children.clear()
        self.tokens = 0

    def _leaves(self) -> list[Node]:
        found, stack = [], [self._root]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if not node.children and node.parent is not None:
                found.append(node)
        return found

    def _split(self, node: Node, at: int) -> Node:
        s, parent = node.segment, node.parent
        assert parent is not None
        top = Node(
            node.ids[:at],
            Segment(s.start, s.start + at, s.keys[:, :, :at], s.values[:, :, :at]),
            parent,
            used=node.used,
        )
        parent.children[int(node.ids[0])] = top
        node.ids, node.parent = node.ids[at:], top
        node.segment = Segment(s.start + at, s.stop, s.keys[:, :, at:], s.values[:, :, at:])
        top.children[int(node.ids[0])] = node
        return top


class SlotPool:
    """Tails of the running sequences of one version: slots 0 to `used` are taken, always without a gap.

    Allocated with calloc, so capacity that no token was written to costs no memory.
    """

    def __init__(self, shape: KVShape, *, slots: int = 64, capacity: int = 256) -> None:
        self.shape, self.slots, self.capacity = shape, slots, capacity
        self.keys, self.values = self._new(), self._new()

    def _new(self) -> Tensor:
        """[layers, slots, heads, capacity, dim], not yet backed by memory, and zero: unset values are finite."""
        s = self.shape
        size = s.layers * self.slots * s.heads * self.capacity * s.dim * s.dtype.itemsize
        # numpy uses calloc; torch.zeros would touch every page (0.7 GB for 64 slots of 512 tokens of a 135M model).
        raw = torch.from_numpy(np.zeros(size, np.uint8)).view(s.dtype)
        return raw.view(s.layers, self.slots, s.heads, self.capacity, s.dim)

    def fit(self, slots: int, capacity: int, lengths: Sequence[int]) -> None:
        """Grow to hold `slots` sequences of `capacity` tail tokens; slot i keeps its first `lengths[i]` tokens."""
        if slots <= self.slots and capacity <= self.capacity:
            return
        while self.slots < slots:
            self.slots *= 2
        while self.capacity < capacity:
            self.capacity *= 2
        old_keys, old_values = self.keys, self.values
        self.keys, self.values = self._new(), self._new()
        for slot, n in enumerate(lengths):  # no more than that: a copied page is a touched page
            self.keys[:, slot, :, :n], self.values[:, slot, :, :n] = (
                old_keys[:, slot, :, :n],
                old_values[:, slot, :, :n],
            )

    def tail(self, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a slot's first tokens, [layers, heads, length, dim]."""
        return self.keys[:, slot, :, :length], self.values[:, slot, :, :length]

    def move(self, source: int, target: int, length: int) -> None:
        for store in (self.keys, self.values):
            store[:, target, :, :length] = store[:, source, :, :length]

    def fill(self, slot: int, tail_start: int, segments: Sequence[Segment]) -> None:
        """Copy segments (or the part of them behind `tail_start`) to their place in a slot."""
        for s in segments:
            skip = max(0, tail_start - s.start)
            at = s.start + skip - tail_start
            n = s.stop - s.start - skip
            if n > 0:
                self.keys[:, slot, :, at : at + n] = s.keys[:, :, skip:]
                self.values[:, slot, :, at : at + n] = s.values[:, :, skip:]

    def shift(self, slot: int, by: int, length: int) -> None:
        """Move a tail of `length` tokens by `by` positions (to the left when negative); cut tokens are lost."""
        for store in (self.keys, self.values):
            if by < 0:
                store[:, slot, :, : length + by] = store[:, slot, :, -by:length].clone()
            else:
                store[:, slot, :, by : length + by] = store[:, slot, :, :length].clone()


class PoolShelf:
    """Keeps one idle pool for the next version with work: its pages are already backed by memory."""

    def __init__(self, shape: KVShape) -> None:
        self.shape = shape
        self._idle: SlotPool | None = None

    def take(self) -> SlotPool:
        pool, self._idle = self._idle, None
        return pool or SlotPool(self.shape)

    def give(self, pool: SlotPool) -> None:
        self._idle = pool
