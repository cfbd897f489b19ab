"""Conversations that exercise a chat format: what rollouts do to it, and what only chats do.

Does not cover: judging the result (`check`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from app.rendering.protocol import Message, Tool

LOOKUP: Tool = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Get the price of an item in dollars.",
        "parameters": {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]},
    },
}
ASK: Message = {"role": "user", "content": "How much are the brown hat and the pink scarf?"}
SYSTEM: Message = {"role": "system", "content": "Answer with the tools."}


def call(*items: str, first: int = 1, **message: Any) -> Message:
    """An assistant message that looks up `items`; calls are numbered from `first`."""
    calls = [
        {"id": f"call_{first + n}", "type": "function", "function": {"name": "lookup", "arguments": _arguments(item)}}
        for n, item in enumerate(items)
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls, **message}


def reply(text: str, number: int = 1) -> Message:
    return {"role": "tool", "tool_call_id": f"call_{number}", "name": "lookup", "content": text}


def say(text: str, **message: Any) -> Message:
    return {"role": "assistant", "content": text, **message}


def _arguments(item: str) -> str:
    return json.dumps({"item": item}, ensure_ascii=False)


_UNICODE = "größe 🧢 帽子 ‮‏ e\u0301 \u00a0 naïve"
_LONG = "hat, size 7 (12.50 $), 'wool' \"felt\"\n\t\\ " * 100
_THOUGHT = "The hat first.\n\nThen the scarf."

# Turns that a rollout can take: assistant messages, each answered by tools.
ROLLOUTS: Mapping[str, Sequence[Message]] = {
    "tool turns": (SYSTEM, ASK, call("brown hat"), reply("84"), call("pink scarf", first=2), reply("31", 2)),
    "words before a call": (ASK, call("brown hat", content="Let me see."), reply("84")),
    "parallel calls": (ASK, call("brown hat", "pink scarf"), reply("84"), reply("31", 2)),
    "empty replies": (SYSTEM, ASK, call("", content=""), reply(""), call("", first=2), reply(" \n", 2)),
    "unicode": ({"role": "user", "content": _UNICODE}, call(_UNICODE), reply(_UNICODE)),
    "long arguments": (ASK, call(_LONG), reply(_LONG)),
    "reasoning": (
        ASK,
        call("brown hat", reasoning_content=_THOUGHT),
        reply("84"),
        call("pink scarf", first=2, reasoning_content=_THOUGHT),
        reply("31", 2),
    ),
}
# What chats do besides: the user speaks again, after which many formats forget earlier reasoning.
CHATS: Mapping[str, Sequence[Message]] = {
    "a later user turn": (SYSTEM, ASK, call("brown hat"), reply("84"), say("It is 84."), ASK),
    "reasoning before a later user turn": (
        ASK,
        call("brown hat", reasoning_content=_THOUGHT),
        reply("84"),
        say("It is 84.", reasoning_content=_THOUGHT),
        ASK,
    ),
}
ALL: Mapping[str, Sequence[Message]] = {**ROLLOUTS, **CHATS}
