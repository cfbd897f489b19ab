"""One dataset row against the job: its messages, its tools, the grader's placeholders (contract §6). Pure.

Does not cover: files and counts (`validation`), how messages become tokens (`app.rendering`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from app.graders.schemas import GraderSpec, check_row
from app.jobs import json_schema

MAX_ROW_TOOLS = 128
_ROLES = ("system", "developer", "user", "assistant", "tool")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

Fault = tuple[str, str]  # field, message


@dataclass(frozen=True)
class RowSpec:
    """What the job says about its rows. `tools` are the names that the job can call.

    `prompt` renders a row that is right otherwise, and says what the model cannot read about it.
    """

    tools: frozenset[str]
    grader: GraderSpec
    prompt: Callable[[Mapping[str, Any]], Fault | None] = lambda row: None


class RowChecker:
    """Checks rows one by one. Rows mostly share their tools, so a tool list is judged once and then remembered."""

    def __init__(self, spec: RowSpec) -> None:
        self.spec = spec
        self.used: set[str] = set()
        self._tools: dict[str, tuple[Fault, ...]] = {}

    def faults(self, row: Mapping[str, Any], number: int) -> list[Fault]:
        """Everything wrong with this row, as (field, message); `number` is its line."""
        found = list(self._structure(row, number))
        if not found and (fault := self.spec.prompt(row)):
            found.append(fault)
        return found

    def _structure(self, row: Mapping[str, Any], number: int) -> Iterator[Fault]:
        if "messages" not in row:
            yield "messages", "is missing"
        else:
            yield from _messages(row["messages"])
        tools = row.get("tools")
        if tools is not None:
            key = json.dumps(tools, sort_keys=True)
            if key not in self._tools:
                if len(self._tools) > 10_000:
                    self._tools.clear()
                self._tools[key] = tuple(self._check_tools(tools))
            yield from self._tools[key]
        if not isinstance(row.get("parallel_tool_calls", True), bool):
            yield "parallel_tool_calls", "must be true or false"
        for path, error in check_row(self.spec.grader, row, number):
            yield f"grader.{path}", f"{{{{{error.placeholder}}}}} {error.reason}"

    def _check_tools(self, tools: object) -> Iterator[Fault]:
        if not isinstance(tools, list):
            yield "tools", "must be a list"
            return
        if len(tools) > MAX_ROW_TOOLS:
            yield "tools", f"has {len(tools)} tools; at most {MAX_ROW_TOOLS} are allowed"
            return
        seen: set[str] = set()
        for index, tool in enumerate(tools):
            where = f"tools[{index}]"
            function = tool.get("function") if isinstance(tool, dict) else None
            if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(function, dict):
                yield where, 'must have the form {"type": "function", "function": {"name", "parameters"}}'
                continue
            yield from self._check_function(function, f"{where}.function", seen)

    def _check_function(self, function: dict[str, Any], where: str, seen: set[str]) -> Iterator[Fault]:
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            yield f"{where}.name", "must be 1 to 64 characters from letters, digits, _ and -"
        elif name in seen:
            yield f"{where}.name", f"{name!r} is given twice"
        elif name not in self.spec.tools:
            there = ", ".join(sorted(self.spec.tools)[:20]) or "it has none"
            yield f"{where}.name", f"{name!r} is not a tool of the job ({there})"
        else:
            seen.add(name)
            self.used.add(name)
        if not isinstance(function.get("description", ""), str):
            yield f"{where}.description", "must be a string"
        if function.get("parameters") is not None and (fault := json_schema.problem(function["parameters"])):
            yield f"{where}.parameters", fault


def _messages(messages: object) -> Iterator[Fault]:
    if not isinstance(messages, list) or not messages:
        yield "messages", "must be a list with at least one message"
        return
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            yield where, "must be an object"
        elif message.get("role") not in _ROLES:
            yield f"{where}.role", f"must be one of {', '.join(_ROLES)}"
        else:
            yield from _content(message, where)
    last = messages[-1]
    if isinstance(last, dict) and last.get("role") in _ROLES and last["role"] != "user":
        yield f"messages[{len(messages) - 1}].role", "the last message must be from the user"


def _content(message: dict[str, Any], where: str) -> Iterator[Fault]:
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None:
        if message["role"] != "assistant":
            yield f"{where}.tool_calls", "only an assistant message may have tool calls"
        else:
            yield from _calls(calls, f"{where}.tool_calls")
        if content is None:
            return
    if isinstance(content, list):
        for index, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                yield f"{where}.content[{index}]", 'must be {"type": "text", "text": "…"}; images are not supported'
    elif not isinstance(content, str):
        yield f"{where}.content", "must be a string or a list of text parts"


def _calls(calls: object, where: str) -> Iterator[Fault]:
    if not isinstance(calls, list):
        yield where, "must be a list"
        return
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            yield (
                f"{where}[{index}]",
                'must have the form {"id", "type": "function", "function": {"name", "arguments"}}',
            )
        elif not _arguments_hold(function.get("arguments")):
            yield f"{where}[{index}].function.arguments", "must be a JSON object, written as a string"


def _arguments_hold(arguments: object) -> bool:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return False
    return isinstance(arguments, dict)
