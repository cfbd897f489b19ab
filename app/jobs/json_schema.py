"""Is this a JSON Schema that we can use safely? Size and depth caps, checked offline.

Does not cover: validating values against it (`app.rendering` parses calls, the user's tool checks its arguments).
"""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs

MAX_BYTES = 64 * 1024
MAX_DEPTH = 32


def problem(schema: object) -> str | None:
    """What is wrong with it, in words, or None. Never opens a connection: a remote `$ref` is refused."""
    if not isinstance(schema, dict):
        return "must be a JSON Schema object"
    if _depth(schema) > MAX_DEPTH:
        return f"is nested deeper than {MAX_DEPTH} levels"
    size = len(json.dumps(schema))
    if size > MAX_BYTES:
        return f"has {size} bytes; the limit is {MAX_BYTES}"
    try:
        jsonschema_rs.validator_for(schema, retriever=_refuse)
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError) as error:
        return f"is not a valid JSON Schema: {str(error).splitlines()[0][:200]}"
    return None


def _refuse(uri: str) -> Any:
    raise ValueError(f"$ref {uri[:100]!r} points outside the schema, which is not allowed")


def _depth(value: object) -> int:
    """Levels of objects and lists, without recursion: a hostile schema may be thousands deep."""
    deepest, stack = 0, [(value, 1)]
    while stack:
        top, level = stack.pop()
        deepest = max(deepest, level)
        if deepest > MAX_DEPTH:
            break
        inner = top.values() if isinstance(top, dict) else top if isinstance(top, list) else ()
        stack.extend((child, level + 1) for child in inner if isinstance(child, dict | list))
    return deepest
