"""What a request asks of the engine and what it gets back, as values.

Does not cover: the wire format (`wire`), nor the state of a sequence while it runs (`lane`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class RequestRefused(Exception):
    """The server answers with this status and the envelope of an OpenAI error."""

    def __init__(self, status: int, message: str, *, type: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.param = status, message, type, param

    def body(self) -> Mapping[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.status}}


class AdapterRefused(Exception):
    """The adapter's files cannot be served: unreadable, incomplete, misshapen, not finite, or of another kind."""


class EngineFault(Exception):
    """The engine could not finish a request that was in order; a retry elsewhere may succeed."""


@dataclass(frozen=True)
class Generation:
    """One sequence to sample. `max_tokens` is already cut to what the context has room for."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | str | None = None
    stop_token_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    score_prompt: bool = False  # answer the log-probs of the prompt; reads nothing from the prefix cache

    @property
    def plain(self) -> bool:
        """True when sampling needs nothing but the raw distribution."""
        return (
            self.temperature == 1.0
            and self.top_p == 1.0
            and self.top_k <= 0
            and self.min_p == 0.0
            and self.repetition_penalty == 1.0
        )


@dataclass(frozen=True)
class Outcome:
    token_ids: list[int]
    log_probs: list[float]  # raw: log-softmax of the logits before temperature and filters
    finish_reason: str  # "stop" or "length"
    stop_reason: int | str | None  # None for the end-of-sequence token
    cached_tokens: int
    prompt_log_probs: list[tuple[float, int]] | None  # (log-prob, rank) of positions 1 …
