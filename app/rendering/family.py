"""One adapter for every renderer that speaks the protocol of the `renderers` package, ours included.

Does not cover: the formats themselves, and multimodal input (refused in `messages`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from renderers import ParsedToolCall, Renderer, ToolCallParseStatus

from app.rendering.messages import normalise
from app.rendering.protocol import (
    INVALID_JSON,
    UNCLOSED_CALL,
    Message,
    MessageNotRenderable,
    ParsedCall,
    ParsedTurn,
    Tool,
)
from app.rendering.tokens import TextTokenizer


class FamilyRenderer:
    """A `ChatRenderer`. `call_end` is the text after which a call is complete, None when the format has none."""

    def __init__(self, renderer: Renderer, tokenizer: TextTokenizer, *, call_end: str | None) -> None:
        self._renderer = renderer
        self._tokenizer = tokenizer
        self._call_end = call_end
        self.stop_token_ids: tuple[int, ...] = tuple(renderer.get_stop_token_ids())

    def stop_strings(self, *, parallel: bool) -> tuple[str, ...]:
        return () if parallel or self._call_end is None else (self._call_end,)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> list[int]:
        plain = normalise(messages)
        if not plain:
            raise MessageNotRenderable("messages", "must not be empty")
        try:
            return list(self._renderer.render_ids(plain, tools=_tools(tools), add_generation_prompt=True))
        except (ValueError, TypeError) as error:
            # What a template forbids (an order of roles, a kind of content) is the caller's input, not our fault.
            raise MessageNotRenderable("messages", str(error)) from error

    def bridge(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        new_messages: Sequence[Message],
        tools: Sequence[Tool] | None,
    ) -> list[int] | None:
        before = [*prompt_ids, *completion_ids]
        rendered = self._renderer.bridge_to_next_turn(
            list(prompt_ids), list(completion_ids), normalise(new_messages), tools=_tools(tools)
        )
        # Some formats cut what follows their last end-of-turn token; what the engine saw must stay to the last id.
        if rendered is None or rendered.token_ids[: len(before)] != before:
            return None
        return list(rendered.token_ids)

    def parse(
        self, completion_ids: Sequence[int], tools: Sequence[Tool] | None, prompt_ids: Sequence[int] | None = None
    ) -> ParsedTurn:
        ids = list(completion_ids)
        try:
            parsed = self._renderer.parse_response(
                ids, tools=_tools(tools), prompt_ids=None if prompt_ids is None else list(prompt_ids)
            )
        except (ValueError, RecursionError):
            # Numbers of thousands of digits and thousands of brackets get past the package's own handling.
            raw = self.decode(ids)
            return ParsedTurn("", None, (ParsedCall(name=None, arguments="", error=INVALID_JSON, raw=raw),))
        calls = tuple(_call(call) for call in parsed.tool_calls)
        # Space between words and a call belongs to the format, which writes it again.
        content = parsed.content.strip() if calls else parsed.content
        return ParsedTurn(content=content, reasoning=parsed.reasoning_content, calls=calls)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)


def _tools(tools: Sequence[Tool] | None) -> list[Any] | None:
    # The whole OpenAI object: that is what the families' own templates print. An empty list means none.
    return [dict(tool) for tool in tools] if tools else None


def _call(call: ParsedToolCall) -> ParsedCall:
    if call.status is ToolCallParseStatus.UNCLOSED_BLOCK:
        return ParsedCall(name=call.name, arguments="", error=UNCLOSED_CALL, raw=call.raw)
    arguments = _arguments_text(call.arguments)
    name = call.name if isinstance(call.name, str) and call.name else None
    # An unknown tool is a well-formed call: the rollout answers it with the tool's error.
    well_formed = call.status in (ToolCallParseStatus.OK, ToolCallParseStatus.UNKNOWN_TOOL)
    if not well_formed or name is None or arguments is None or not _is_unicode(name):
        return ParsedCall(name=name, arguments=arguments or "", error=INVALID_JSON, raw=call.raw)
    return ParsedCall(name=name, arguments=arguments, error=None, raw=call.raw)


def _arguments_text(arguments: Any) -> str | None:
    """JSON text of an object; None for anything else and for NaN and infinity, which Python reads and JSON forbids."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return text if _is_unicode(text) else json.dumps(arguments, allow_nan=False)


def _is_unicode(text: str) -> bool:
    """False for a lone surrogate, which JSON escapes can spell and no wire can carry."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
