"""The endless shuffled stream of dataset rows, and what of it is used up, so that a resume returns to the same rows.

Does not cover: which rows a step takes. Batches are sampled ahead, so the rows that trained steps consumed need not be
a prefix of the stream: the cursor of a snapshot holds a position below which all are used up, and those above it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from workers.rollouts.types import Row


class Consumed:
    """Positions of the stream whose groups belong to steps that were taken."""

    def __init__(self, cursor: Mapping[str, Any]) -> None:
        self._below = int(cursor.get("position", 0))
        self._above = {int(position) for position in cursor.get("taken", ())}

    def add(self, positions: Iterable[int]) -> None:
        self._above.update(positions)
        while self._below in self._above:
            self._above.remove(self._below)
            self._below += 1

    def cursor(self) -> dict[str, Any]:
        """For the snapshot; `Consumed(cursor)` is this again."""
        return {"position": self._below, "taken": sorted(self._above)}


class RowStream:
    """Every epoch is a new permutation that depends only on (seed, epoch), so position N is always the same row."""

    def __init__(self, rows: Sequence[Row], seed: int, cursor: Mapping[str, Any] | None = None) -> None:
        cursor = cursor or {}
        self._rows = rows
        self._seed = seed
        self._next = int(cursor.get("position", 0))
        self._skip = {int(position) for position in cursor.get("taken", ())}
        self._epoch = -1
        self._order: list[int] = []

    def take(self) -> tuple[int, Row]:
        """The next row with its position; the stream never ends."""
        while self._next in self._skip:
            self._skip.remove(self._next)
            self._next += 1
        position = self._next
        self._next += 1
        epoch, offset = divmod(position, len(self._rows))
        if epoch != self._epoch:
            self._order = list(range(len(self._rows)))
            random.Random(f"{self._seed}:{epoch}").shuffle(self._order)
            self._epoch = epoch
        return position, self._rows[self._order[offset]]
