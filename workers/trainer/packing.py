"""Prefix packing: the rollouts of a micro-batch as one trie, so a shared prefix is forwarded once.

Does not cover: the attention over the packed row (`workers.trainer.attention`), nor reading the batch file
(`workers.batch`).

Rows are sorted descending, so a row shares with its predecessor the longest prefix it shares with any earlier row, and
owns only the tail behind it. The packed row is the concatenation of those tails in the order of the attention calls; a
token's *slot* is its index there.
The last token of a row predicts nothing and gets no slot. A token's *node* identifies (prefix, token): the same sampled
token after the same prefix is scored once, whatever number of rows contain it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# A row joins a batched attention call up to these sizes: its probabilities are kept for the backward pass.
# Longer rows get a call of their own that recomputes them.
MAX_BATCHED_TAIL = 256
MAX_BATCHED_PATH = 1024
MAX_BATCHED_CELLS = 16_000_000  # padded score cells per head in one batched call
MIN_BATCHED_ROWS = 8  # below this, a shorter tail is padded rather than given another call
MAX_ALONE_CELLS = 400_000  # a lone row with fewer score cells per head is a batch of one row
TAIL_RATIO = 0.7  # above MIN_BATCHED_ROWS, a tail shorter than this share of the longest starts the next call

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TailCall:
    """One row attended alone: queries are the slots [start, stop), keys the slots of `path`; it ends with them."""

    start: int
    stop: int
    path: Tensor | None  # int64 [keys]; None: the path is exactly the slots [start, stop)


@dataclass(frozen=True)
class BatchedCall:
    """Rows attended together: each row's keys are its path, of which all rows have the first `common` slots in common.

    Padded queries repeat slot `start`, see the common prefix and one key more, and are dropped by `unpad`.
    """

    start: int
    stop: int
    common: int
    queries: Tensor  # int64 [rows * longest tail] slots, padded
    padding: Tensor  # bool [rows * longest tail], True = padding
    keys: Tensor  # int64 [rows, longest path] slots, padded
    blocked: Tensor  # bool [rows, longest tail, longest own part], True = must not attend
    unpad: Tensor  # int64 [stop - start] index into the padded queries
    rows: int


@dataclass(frozen=True)
class TreePlan:
    """Everything one packed forward pass needs. N slots, M scored nodes, R rows, T trained positions."""

    ids: Tensor  # int64 [1, N]
    positions: Tensor  # int64 [1, N]
    calls: tuple[TailCall | BatchedCall, ...]  # cover the slots in order
    scored_slots: Tensor  # int64 [M] the slot whose hidden state predicts the node
    scored_ids: Tensor  # int64 [M] the token predicted
    trained_rows: Tensor  # int64 [T] row (input order) …
    trained_positions: Tensor  # int64 [T] … and position in it …
    trained_nodes: Tensor  # int64 [T] … and its index among the scored nodes

    @property
    def forwarded(self) -> int:
        return int(self.ids.shape[1])


@dataclass(frozen=True)
class _Row:
    """A row in trie order; it owns its positions from `shared` on. `nodes` are numbered through the trie."""

    index: int
    length: int
    shared: int
    nodes: Ints

    @property
    def tail(self) -> int:
        return max(0, self.length - 1 - self.shared)


def trie_order(rows: Sequence[Sequence[int]]) -> list[int]:
    """Row indices in the order that makes neighbours share the most: descending, a longer row before its prefixes."""
    return sorted(range(len(rows)), key=lambda index: (list(rows[index]), -index), reverse=True)


def owned_tokens(rows: Sequence[Sequence[int]]) -> list[int]:
    """For rows already in trie order: how many slots each adds behind its predecessors."""
    owned = []
    previous: Sequence[int] = ()
    for row in rows:
        owned.append(max(0, len(row) - 1 - _shared(previous, row)))
        previous = row
    return owned


def plan_tree(rows: Sequence[Sequence[int]], masks: Sequence[Sequence[int]], device: torch.device) -> TreePlan:
    """Pack `rows` (token ids, at least two tokens each); `masks` marks the positions whose log-prob is wanted.

    Position 0 has no context and is never scored, whatever its mask.
    """
    trie = _trie(rows)
    groups = _call_groups(trie)
    slot_of_node = _slots(trie, groups)
    ids: list[int] = []
    positions: list[int] = []
    for row in (row for group in groups for row in group.rows):
        ids.extend(rows[row.index][row.shared : row.shared + row.tail])
        positions.extend(range(row.shared, row.shared + row.tail))

    trained_rows, trained_positions, nodes, slots, targets = [], [], [], [], []
    for row in trie:
        wanted = np.flatnonzero(np.asarray(masks[row.index][1:])) + 1
        trained_rows.append(np.full(len(wanted), row.index))
        trained_positions.append(wanted)
        nodes.append(row.nodes[wanted])
        slots.append(slot_of_node[row.nodes[wanted - 1]])
        targets.append(np.asarray(rows[row.index])[wanted])
    unique, first, inverse = np.unique(np.concatenate(nodes), return_index=True, return_inverse=True)
    assert len(unique) == len(first)

    def tensor(values: Ints | Sequence[int]) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=device)

    return TreePlan(
        ids=tensor(ids)[None],
        positions=tensor(positions)[None],
        calls=tuple(_call(group, slot_of_node, device) for group in groups),
        scored_slots=tensor(np.concatenate(slots)[first]),
        scored_ids=tensor(np.concatenate(targets)[first]),
        trained_rows=tensor(np.concatenate(trained_rows)),
        trained_positions=tensor(np.concatenate(trained_positions)),
        trained_nodes=tensor(inverse.reshape(-1)),
    )


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    limit = min(len(one), len(other))
    different = np.flatnonzero(np.asarray(one[:limit]) != np.asarray(other[:limit]))
    return int(different[0]) if len(different) else limit


def _trie(rows: Sequence[Sequence[int]]) -> list[_Row]:
    trie: list[_Row] = []
    next_node = 0
    for index in trie_order(rows):
        length = len(rows[index])
        previous = trie[-1] if trie else None
        shared = _shared(rows[previous.index], rows[index]) if previous else 0
        inherited = previous.nodes[:shared] if previous else np.zeros(0, dtype=np.int64)
        nodes = np.concatenate([inherited, np.arange(next_node, next_node + length - shared)])
        trie.append(_Row(index, length, shared, nodes))
        next_node += length - shared
    return trie


@dataclass(frozen=True)
class _Group:
    """Rows of one attention call. `common`: how much of their paths all share; None: a lone row."""

    rows: tuple[_Row, ...]
    common: int | None


def _call_groups(trie: Sequence[_Row]) -> list[_Group]:
    """Cut the rows that own slots into calls: neighbours that share at least half of their path, alike in length."""
    groups: list[_Group] = []
    cluster: list[_Row] = []
    for row in trie:
        if not row.tail:
            continue
        path = row.length - 1
        alone = row.tail > MAX_BATCHED_TAIL or path > MAX_BATCHED_PATH or 2 * row.shared < path
        if cluster and (alone or min(row.shared, _common(cluster)) < row.shared // 2):
            groups.extend(_split(cluster))
            cluster = []
        if alone:
            groups.append(_Group((row,), None))
        else:
            cluster.append(row)
    groups.extend(_split(cluster))
    return groups


def _common(rows: Sequence[_Row]) -> int:
    """Length of the prefix common to the paths of all rows, none of whose own queries lie inside it."""
    return min(row.shared for row in rows)


def _split(cluster: Sequence[_Row]) -> list[_Group]:
    """Longest tails first, so that one long tail does not pad all the others."""
    groups: list[list[_Row]] = []
    for row in sorted(cluster, key=lambda row: -row.tail):
        if groups:
            batch = groups[-1]
            cells = (len(batch) + 1) * batch[0].tail * max(r.length for r in [*batch, row])
            short = len(batch) >= MIN_BATCHED_ROWS and row.tail < TAIL_RATIO * batch[0].tail
            if cells <= MAX_BATCHED_CELLS and not short:
                batch.append(row)
                continue
        groups.append([row])
    common = _common(cluster) if cluster else 0
    return [_Group(tuple(batch), common if len(batch) > 1 else None) for batch in groups]


def _slots(trie: Sequence[_Row], groups: Sequence[_Group]) -> Ints:
    """Slot of every node, by the order of the calls; -1 for the last tokens of rows, which have none."""
    slots = np.full(1 + max(int(row.nodes[-1]) for row in trie), -1, dtype=np.int64)
    start = 0
    for row in (row for group in groups for row in group.rows):
        slots[row.nodes[row.shared : row.shared + row.tail]] = np.arange(start, start + row.tail)
        start += row.tail
    return slots


def _call(group: _Group, slots: Ints, device: torch.device) -> TailCall | BatchedCall:
    row = group.rows[0]
    if group.common is None and row.tail * row.length > MAX_ALONE_CELLS:
        return _tail_call(row, slots, device)
    return _batched_call(group.rows, group.common or 0, slots, device)


def _tail_call(row: _Row, slots: Ints, device: torch.device) -> TailCall:
    path = slots[row.nodes[:-1]]
    start = int(path[row.shared])
    own = None if row.shared == 0 else torch.as_tensor(path, device=device)
    return TailCall(start, start + row.tail, own)


def _batched_call(rows: Sequence[_Row], common: int, slots: Ints, device: torch.device) -> BatchedCall:
    paths = [slots[row.nodes[:-1]] for row in rows]
    starts = [int(path[row.shared]) for row, path in zip(rows, paths, strict=True)]
    tail = max(row.tail for row in rows)
    own = max(len(path) - common for path in paths)
    queries = np.full((len(rows), tail), starts[0], dtype=np.int64)
    padding = np.ones((len(rows), tail), dtype=np.bool_)
    keys = np.full((len(rows), common + own), starts[0], dtype=np.int64)
    allowed = np.zeros((len(rows), tail, own), dtype=np.bool_)
    allowed[:, :, 0] = True
    unpad = []
    for index, (row, path, start) in enumerate(zip(rows, paths, starts, strict=True)):
        queries[index, : row.tail] = np.arange(start, start + row.tail)
        padding[index, : row.tail] = False
        keys[index, : len(path)] = path
        seen = row.shared - common + np.arange(row.tail)[:, None]
        allowed[index, : row.tail] = np.arange(own)[None, :] <= seen
        unpad.append(index * tail + np.arange(row.tail))

    def tensor(values: NDArray[np.int64] | NDArray[np.bool_]) -> Tensor:
        return torch.as_tensor(values, device=device)

    return BatchedCall(
        start=starts[0],
        stop=starts[-1] + rows[-1].tail,
        common=common,
        queries=tensor(queries.reshape(-1)),
        padding=tensor(padding.reshape(-1)),
        keys=tensor(keys),
        blocked=tensor(~allowed),
        unpad=tensor(np.concatenate(unpad)),
        rows=len(rows),
    )
