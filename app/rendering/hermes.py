"""Tool calls for ChatML models whose own template knows no tools, behind the `renderers` package's `Renderer` protocol.

Does not cover: reasoning blocks, and the model's own default system prompt: none is invented. The format is Hermes-
like and was measured on a 135M model (docs/decisions): tools as JSON lines inside the system message, calls as
`<tool_call>` JSON blocks, the results of one turn as `<tool_response>` lines in one message of the role `tool`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from renderers import ParsedResponse, ParsedToolCall, RenderedTokens, ToolCallParseStatus, extract_message_tool_names

from app.rendering.protocol import NoRenderer
from app.rendering.tokens import TextTokenizer

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
HOW_TO_CALL = 'To call a tool, write <tool_call>{"name": "<tool>", "arguments": {<args>}}</tool_call>.'
PREAMBLE = -1  # message index of tokens that belong to no message


class HermesRenderer:
    """Renders append-only: the ids of a conversation are a prefix of the ids of every continuation."""

    is_prefix_stable = True

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._im_start = _control_token(tokenizer, "<|im_start|>")
        self._im_end = _control_token(tokenizer, "<|im_end|>")
        others = (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>"))
        self._stops = list(dict.fromkeys([self._im_end, *(i for i in others if i is not None)]))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> RenderedTokens:
        """Raises ValueError without messages, as the package's own renderers do."""
        if not messages:
            raise ValueError("No messages provided.")
        out = _Tokens(self)
        rest = list(enumerate(messages))
        if tools:
            preamble = _tools_text(tools)
            if messages[0].get("role") == "system":
                text = _content(messages[0])
                out.message("system", f"{text}\n{preamble}" if text else preamble, 0)
                rest = rest[1:]
            else:
                out.message("system", preamble, PREAMBLE)
        self._emit(rest, out)
        if add_generation_prompt:
            out.generation_prompt()
        return out.rendered(messages)

    def render_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> list[int]:
        ids: list[int] = self.render(messages, tools=tools, add_generation_prompt=add_generation_prompt).token_ids
        return ids

    def bridge_to_next_turn(
        self,
        previous_prompt_ids: Sequence[int],
        previous_completion_ids: Sequence[int],
        new_messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> RenderedTokens | None:
        """Everything sampled stays; a turn that was cut by length or stopped after a call is closed for the model.

        None when the new messages contain an assistant turn, or when the completion goes on after its end of turn.
        """
        completion = list(previous_completion_ids)
        if not previous_prompt_ids or not new_messages or self._im_end in completion[:-1]:
            return None
        if any(message.get("role") not in ("user", "tool", "system") for message in new_messages):
            return None
        out = _Tokens(self)
        out.ids([*previous_prompt_ids, *completion], PREAMBLE)
        if completion[-1:] != [self._im_end]:
            out.ids([self._im_end], PREAMBLE)
        out.text("\n", PREAMBLE)
        self._emit(list(enumerate(new_messages)), out)
        out.generation_prompt()
        return out.rendered(new_messages)

    def parse_response(
        self,
        token_ids: Sequence[int],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        prompt_ids: Sequence[int] | None = None,
    ) -> ParsedResponse:
        """Every `<tool_call>` block, good or bad, in order; what stands outside them is content."""
        ids = list(token_ids)
        end = next((at for at, token in enumerate(ids) if token in self._stops), len(ids))
        text = self._tokenizer.decode(ids[:end])
        outside: list[str] = []
        calls: list[ParsedToolCall] = []
        position = 0
        while (start := text.find(CALL_OPEN, position)) >= 0:
            outside.append(text[position:start])
            close = text.find(CALL_CLOSE, start)
            if close < 0:
                position = len(text)
                calls.append(ParsedToolCall(raw=text[start:], status=ToolCallParseStatus.UNCLOSED_BLOCK))
            else:
                position = close + len(CALL_CLOSE)
                calls.append(_parse_block(text[start + len(CALL_OPEN) : close], text[start:position]))
        outside.append(text[position:])
        content = "".join(outside)
        return ParsedResponse(content=content.strip() if calls else content, tool_calls=calls)

    def get_stop_token_ids(self) -> list[int]:
        return list(self._stops)

    def _emit(self, messages: Sequence[tuple[int, Mapping[str, Any]]], out: _Tokens) -> None:
        for position, (index, message) in enumerate(messages):
            role = message["role"]
            if role == "tool":
                joins = position > 0 and messages[position - 1][1]["role"] == "tool"
                continues = position + 1 < len(messages) and messages[position + 1][1]["role"] == "tool"
                out.tool_result(_content(message), index, joins=joins, continues=continues)
            elif role == "assistant":
                out.message(role, _assistant_text(message), index, sampled=True)
            else:
                out.message(role, _content(message), index)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text) if text else []


class _Tokens:
    """Ids, their owners, and which a model would have sampled. Text between control tokens is encoded in one piece."""

    def __init__(self, renderer: HermesRenderer) -> None:
        self._renderer = renderer
        self._ids: list[int] = []
        self._owners: list[int] = []
        self._sampled: list[bool] = []

    def ids(self, ids: Sequence[int], owner: int, *, sampled: bool = False) -> None:
        self._ids.extend(ids)
        self._owners.extend([owner] * len(ids))
        self._sampled.extend([sampled] * len(ids))

    def text(self, text: str, owner: int, *, sampled: bool = False) -> None:
        self.ids(self._renderer._encode(text), owner, sampled=sampled)

    def message(self, role: str, text: str, owner: int, *, sampled: bool = False) -> None:
        if sampled:
            # A model starts to write after the header, so header and body are two pieces in its ids as well.
            self.open(f"{role}\n", owner)
            self.text(text, owner, sampled=True)
        else:
            self.open(f"{role}\n{text}", owner)
        self.close(owner, sampled=sampled)

    def tool_result(self, text: str, owner: int, *, joins: bool, continues: bool) -> None:
        line = f"<tool_response>{text}</tool_response>"
        if joins:
            self.text(f"\n{line}", owner)
        else:
            self.open(f"tool\n{line}", owner)
        if not continues:
            self.close(owner)

    def generation_prompt(self) -> None:
        self.open("assistant\n", PREAMBLE)

    def open(self, text: str, owner: int) -> None:
        self.ids([self._renderer._im_start], owner)
        self.text(text, owner)

    def close(self, owner: int, *, sampled: bool = False) -> None:
        self.ids([self._renderer._im_end], owner, sampled=sampled)
        self.text("\n", owner)

    def rendered(self, messages: Sequence[Mapping[str, Any]]) -> RenderedTokens:
        return RenderedTokens(
            token_ids=self._ids,
            message_indices=self._owners,
            sampled_mask=self._sampled,
            message_roles=[str(message.get("role") or "") for message in messages],
            message_tool_names=extract_message_tool_names(list(messages)),
        )


def _control_token(tokenizer: TextTokenizer, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(found, int):
        raise NoRenderer(f"{tokenizer.name_or_path}: the tokenizer has no {token}, which the renderer `hermes` needs")
    return found


def _tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return f"<tools>\n{lines}\n</tools>\n{HOW_TO_CALL}"


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return content or ""


def _assistant_text(message: Mapping[str, Any]) -> str:
    lines = [_content(message)] if _content(message) else []
    for call in message.get("tool_calls") or ():
        function = call.get("function") or call
        arguments = function.get("arguments", {})
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        name = json.dumps(function.get("name"), ensure_ascii=False)
        lines.append(f'{CALL_OPEN}{{"name": {name}, "arguments": {written}}}{CALL_CLOSE}')
    return "\n".join(lines)


def _parse_block(body: str, raw: str) -> ParsedToolCall:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return ParsedToolCall(raw=raw, status=ToolCallParseStatus.INVALID_JSON)
    if not isinstance(value, dict) or not isinstance(value.get("arguments"), dict):
        return ParsedToolCall(raw=raw, status=ToolCallParseStatus.MALFORMED_STRUCTURE)
    name = value.get("name")
    if not isinstance(name, str) or not name:
        return ParsedToolCall(raw=raw, arguments=value["arguments"], status=ToolCallParseStatus.MISSING_NAME)
    return ParsedToolCall(raw=raw, name=name, arguments=value["arguments"])
