"""The renderer that the rest of the service sees: messages and tools to token ids, token ids to text and calls.

Does not cover: any model family's format (`hermes`, `family`) and the choice of one (`registry`).
Every method is pure and may be called from several threads at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = Mapping[str, Any]  # an OpenAI chat message
Tool = Mapping[str, Any]  # {"type": "function", "function": {...}}

INVALID_JSON = "invalid JSON"
UNCLOSED_CALL = "tool call not closed"


class RenderingError(Exception):
    """Root of what this room raises."""


class MessageNotRenderable(RenderingError):
    """A message that this model cannot read. `param` is its path, such as `messages.3.content`."""

    def __init__(self, param: str, reason: str) -> None:
        self.param, self.reason = param, reason
        super().__init__(f"{param}: {reason}")


class NoRenderer(RenderingError):
    """No renderer fits the model, or the named one does not exist; the message lists the choices."""


@dataclass(frozen=True)
class ParsedCall:
    """One attempt of the model to call a tool, good or bad.

    `arguments` is JSON text of an object, "" when unreadable. `error` says in words shown to the model why the call is
    invalid, None when it is valid. `raw` is what the model wrote.
    """

    name: str | None
    arguments: str
    error: str | None
    raw: str


@dataclass(frozen=True)
class ParsedTurn:
    """One assistant message: text outside the calls, reasoning (None when the format has none), calls in order."""

    content: str
    reasoning: str | None
    calls: tuple[ParsedCall, ...]


class ChatRenderer(Protocol):
    """What rollouts, evaluation and chat use; one per base model."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]: ...

    def stop_strings(self, *, parallel: bool) -> tuple[str, ...]:
        """Texts that end a turn. parallel=False: the end of the first call; empty when the format has no such text."""
        ...

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> list[int]:
        """Ids of the whole conversation, ending where the assistant starts to write. Raises MessageNotRenderable."""
        ...

    def bridge(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        new_messages: Sequence[Message],
        tools: Sequence[Tool] | None,
    ) -> list[int] | None:
        """The next prompt: both inputs verbatim, then the new messages. None when the format cannot promise that."""
        ...

    def parse(
        self, completion_ids: Sequence[int], tools: Sequence[Tool] | None, prompt_ids: Sequence[int] | None = None
    ) -> ParsedTurn:
        """Read what the model wrote. Never raises for model output."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens included."""
        ...
