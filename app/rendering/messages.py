"""OpenAI chat messages into the plain form that renderers read.

Does not cover: whether a conversation makes sense (the files and inference rooms check rows and requests), and images
or audio: they are refused, never dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from app.rendering.protocol import Message, MessageNotRenderable
from app.rendering.tokens import HEADERS

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def normalise(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Content as a string, tool-call arguments as an object where they are one, `developer` as `system`.

    A tool message gets the name of the function it answers when the call is in the list or the caller put it there:
    some formats write it. Raises MessageNotRenderable with the path of the field.
    """
    plain: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        role = ROLES.get(str(message.get("role")))
        if role is None:
            raise MessageNotRenderable(f"{where}.role", f"must be one of {', '.join(ROLES)}")
        entry: dict[str, Any] = {"role": role, "content": text_of(message.get("content"), f"{where}.content")}
        if role == "assistant":
            _copy_assistant(message, entry, where, names)
        elif role == "tool":
            name = message.get("name") or names.get(str(message.get("tool_call_id")))
            for key, value in (("tool_call_id", message.get("tool_call_id")), ("name", name)):
                if isinstance(value, str):
                    entry[key] = value
        plain.append(entry)
    return plain


def text_of(content: Any, param: str) -> str:
    """A string, None, or a list of text parts, as one string."""
    if content is None:
        return ""
    if isinstance(content, str):
        # The tokenizer reads exactly these texts as control tokens; with one more space it does not.
        return content + " " if content in HEADERS else content
    if not isinstance(content, list):
        raise MessageNotRenderable(param, "must be a string, null or a list of text parts")
    pieces = []
    for index, part in enumerate(content):
        text = part.get("text", part.get("refusal")) if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            raise MessageNotRenderable(f"{param}.{index}", "only text parts can be rendered for this model")
        pieces.append(text)
    return text_of("".join(pieces), param)


def _copy_assistant(message: Message, entry: dict[str, Any], where: str, names: dict[str, str]) -> None:
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str):
        entry["reasoning_content"] = reasoning
    calls = message.get("tool_calls") or ()
    plain_calls = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise MessageNotRenderable(f"{where}.tool_calls.{index}.function.name", "must be a string")
        plain: dict[str, Any] = {
            "type": "function",
            "function": {"name": function["name"], "arguments": _arguments(function.get("arguments"))},
        }
        if isinstance(call.get("id"), str):
            plain["id"] = call["id"]
            names[call["id"]] = function["name"]
        plain_calls.append(plain)
    if plain_calls:
        entry["tool_calls"] = plain_calls


def _arguments(arguments: Any) -> Any:
    """An object where the JSON text is one; text that is not stays as it was written."""
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        return value if isinstance(value, dict) else arguments
    return arguments
