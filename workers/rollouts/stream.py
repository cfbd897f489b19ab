"""The endless shuffled stream of dataset rows, and a position in it that a resume can return to.

Does not cover: which rows were trained — the cursor stored with a snapshot says up to where the stream was used up.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from workers.rollouts.types import Row


class RowStream:
    """Every epoch is a new permutation that depends only on (seed, epoch), so position N is always the same row."""

    def __init__(self, rows: Sequence[Row], seed: int, position: int = 0) -> None:
        self._rows = rows
        self._seed = seed
        self.position = position
        self._epoch = -1
        self._order: list[int] = []

    def take(self) -> Row:
        """The next row; the stream never ends."""
        epoch, offset = divmod(self.position, len(self._rows))
        if epoch != self._epoch:
            self._order = list(range(len(self._rows)))
            random.Random(f"{self._seed}:{epoch}").shuffle(self._order)
            self._epoch = epoch
        self.position += 1
        return self._rows[self._order[offset]]
