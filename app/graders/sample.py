"""Builds the `sample` that graders see, from a finished trajectory.

Does not cover: parsing of tool calls out of tokens (`app.rendering`); what comes here is chat-completions messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from app.graders.base import Sample


def sample_of_messages(
    messages: Sequence[Mapping[str, Any]], *, finish_reason: str = "stop", wants_json: bool = False
) -> Sample:
    """The sample of one trajectory. `messages` are those after the prompt: assistant and tool messages in order.

    wants_json: the job has a `response_format`, so `output_json` is filled when the final text parses.
    An episode that ended on a tool call has the text of that last message, which is usually empty.
    """
    said = [message for message in messages if message.get("role") == "assistant"]
    final: Mapping[str, Any] = said[-1] if said else {"role": "assistant", "content": ""}
    text = final.get("content") or ""
    calls = [dict(call) for message in said for call in message.get("tool_calls") or ()]
    return Sample(
        output_text=text,
        output_json=_json_or_none(text) if wants_json else None,
        output_tools=calls,
        choices=[{"index": 0, "message": dict(final), "finish_reason": finish_reason}],
    )


def _json_or_none(text: str) -> Any | None:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
