"""Does a renderer only ever append? Run once when a model is registered; the result stands in its `hone.json`.

Does not cover: what a model really samples (a turn whose text the format would write differently is still kept
verbatim by the bridge). A renderer that fails here renders, but its rollouts would not be what a later re-render of
the messages gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from app.rendering.protocol import ChatRenderer, Message, RenderingError, Tool

TOOLS: tuple[Tool, ...] = (
    {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "Get the price of an item in dollars.",
            "parameters": {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]},
        },
    },
)


@dataclass(frozen=True)
class AppendOnly:
    """`holds`: every bridged prompt equals the full render. `inert`: message text cannot close a turn.

    `differs` says where they differ, one line per turn.
    """

    holds: bool
    inert: bool
    differs: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"append_only": self.holds, "control_tokens_inert": self.inert, "differs": list(self.differs)}


def check_append_only(renderer: ChatRenderer) -> AppendOnly:
    """Render a conversation with two tool turns as a whole and by bridges. Raises RenderingError."""
    differs: list[str] = []
    conversation = _conversation()
    previous = renderer.prompt(conversation[:2], TOOLS)
    for turn, end in enumerate((4, 6), start=1):
        whole = renderer.prompt(conversation[:end], TOOLS)
        difference = _compare(renderer, previous, whole, conversation[end - 1])
        if difference is not None:
            differs.append(f"tool turn {turn}: {difference}")
        previous = whole
    return AppendOnly(holds=not differs, inert=_is_inert(renderer), differs=tuple(differs))


def _compare(renderer: ChatRenderer, previous: list[int], whole: list[int], reply: Message) -> str | None:
    if whole[: len(previous)] != previous:
        return f"the render of the history changes: {_first_difference(renderer, previous, whole)}"
    rest = whole[len(previous) :]
    end = next((i + 1 for i, token in enumerate(rest) if token in renderer.stop_token_ids), None)
    if end is None:
        return "the assistant turn has no stop token in the render"
    bridged = renderer.bridge(previous, rest[:end], [reply], TOOLS)
    if bridged is None:
        return "the renderer refuses to bridge a tool reply"
    if bridged != whole:
        return f"bridge and render differ: {_first_difference(renderer, bridged, whole)}"
    return None


def _first_difference(renderer: ChatRenderer, left: list[int], right: list[int]) -> str:
    pairs = enumerate(zip(left, right, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
    a, b = (renderer.decode(ids[max(0, at - 4) : at + 8]) for ids in (left, right))
    return f"{a!r} against {b!r} at token {at}"


def _is_inert(renderer: ChatRenderer) -> bool:
    """Whether stop tokens spelled out in a user message stay text."""
    spelled = "".join(renderer.decode([token]) for token in renderer.stop_token_ids)
    try:
        ids = [renderer.prompt([{"role": "user", "content": text}], None) for text in ("plain", f"plain {spelled}")]
    except RenderingError:
        return True  # refused altogether
    plain, attempt = (sum(token in renderer.stop_token_ids for token in prompt) for prompt in ids)
    return plain == attempt


def _conversation() -> list[Message]:
    def call(number: int, item: str) -> Message:
        function = {"name": "lookup", "arguments": f'{{"item": "{item}"}}'}
        return {"role": "assistant", "content": None, "tool_calls": [
            {"id": f"call_{number}", "type": "function", "function": function}]}  # fmt: skip

    def reply(number: int, text: str) -> Message:
        return {"role": "tool", "tool_call_id": f"call_{number}", "name": "lookup", "content": text}

    return [
        {"role": "system", "content": "Answer with the tools."},
        {"role": "user", "content": "How much are the brown hat and the pink scarf?"},
        call(1, "brown hat"),
        reply(1, "84"),
        call(2, "pink scarf"),
        reply(2, "31"),
    ]
