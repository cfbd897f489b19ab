"""One sequence while it runs: its text, its log-probs, what is cached of it, and when it is over.

Does not cover: the slot it has and the steps it takes part in (`lane`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from workers.sampler.builtin.generation import EngineFault, Generation, Outcome
from workers.sampler.builtin.kv import Ids, Segment
from workers.sampler.builtin.text import StopStrings


@dataclass(eq=False)
class Running:
    """One sequence. `ids[:length]` is known text; keys and values exist for `ids[:computed]`."""

    generation: Generation
    finish: Callable[[Outcome | EngineFault], None]
    stops: StopStrings | None
    ids: Ids = field(init=False)
    length: int = field(init=False)
    rng: random.Random = field(init=False)
    computed: int = 0
    cached: int = 0
    tail_start: int = 0
    attached: tuple[Segment, ...] = ()
    fresh: bool = True  # admitted, its cached tokens not yet in a slot
    log_probs: list[float] = field(default_factory=list)
    scores: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        prompt = self.generation.prompt
        self.ids = np.zeros(len(prompt) + self.generation.max_tokens, np.int64)
        self.ids[: len(prompt)] = prompt
        self.length = len(prompt)
        self.rng = random.Random(self.generation.seed)

    @property
    def prompt_length(self) -> int:
        return len(self.generation.prompt)

    @property
    def prefilling(self) -> bool:
        return self.computed < self.prompt_length

    def outcome(self, reason: str, stop: int | str | None) -> Outcome:
        g = self.generation
        return Outcome(
            self.ids[self.prompt_length : self.length].tolist(),
            self.log_probs,
            reason,
            stop,
            self.cached,
            self.scores if g.score_prompt else None,
        )

    def ending(self, token: int, eos: frozenset[int]) -> tuple[str, int | str | None] | None:
        """Finish reason and stop reason if `token`, the last of the text, ends it."""
        g = self.generation
        if token in eos and not g.ignore_eos:
            return "stop", None
        if token in g.stop_token_ids:
            return "stop", token
        if self.stops is not None:
            hit = self.stops.find(self.ids[self.prompt_length : self.length].tolist())
            if hit is not None:
                return "stop", hit
        return ("length", None) if self.length == len(self.ids) else None


class Seen(Sequence[int]):
    """The text of a row, read only when a repetition penalty asks for it."""

    def __init__(self, row: Running) -> None:
        self._row = row

    def __len__(self) -> int:
        return self._row.length

    def __getitem__(self, at: Any) -> Any:
        return self._row.ids[: self._row.length][at].tolist()
