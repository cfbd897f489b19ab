"""What the model wrote becomes a choice, and nothing it wrote is lost.

Does not cover: the formats of other model families (`tests/unit/rendering`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from app.inference.request import read
from app.inference.schemas import ChatRequest
from app.inference.turns import Choice, read_turn
from app.rendering.protocol import ChatRenderer
from tests.unit.inference.model import CALL, LOOKUP, completion

Read = Callable[..., Choice]


@pytest.fixture
def turn(renderer: ChatRenderer, encode: Callable[[str], list[int]], end: int) -> Read:
    def made(text: str, *, ask: dict[str, Any] | None = None, **given: Any) -> Choice:
        fields = {"model": "m", "messages": [{"role": "user", "content": "?"}], "tools": [LOOKUP], **(ask or {})}
        written = completion(encode, text, **{"end": end, **given})
        return read_turn(renderer, read(ChatRequest.model_validate(fields)), [1], written)

    return made


def test_plain_text_is_content(turn: Read) -> None:
    choice = turn("The answer is 84.")
    assert (choice.content, choice.tool_calls, choice.finish_reason) == ("The answer is 84.", (), "stop")
    assert choice.completion_tokens == len("The answer is 84.") + 1


def test_a_call_alone_leaves_the_content_null(turn: Read) -> None:
    choice = turn(CALL)
    assert (choice.content, choice.finish_reason) == (None, "tool_calls")
    assert choice.tool_calls[0]["function"]["name"] == "lookup"
    assert json.loads(choice.tool_calls[0]["function"]["arguments"]) == {"item": "hat"}


def test_parallel_calls_have_ids_of_their_own(turn: Read) -> None:
    first, second = turn(CALL + CALL).tool_calls
    assert first["id"].startswith("call_")
    assert first["id"] != second["id"]


def test_a_call_that_cannot_be_read_stays_visible(turn: Read) -> None:
    broken = '<tool_call>{"name": "lookup", "arguments": {</tool_call>'
    choice = turn(f"Let me see.{broken}")
    assert choice.content is not None
    assert "Let me see." in choice.content
    assert broken in choice.content
    assert (choice.finish_reason, choice.errors) == ("stop", ("invalid JSON",))


def test_a_good_call_beside_a_broken_one_is_still_a_call(turn: Read) -> None:
    choice = turn(f"<tool_call>nonsense</tool_call>{CALL}")
    assert choice.content == "<tool_call>nonsense</tool_call>"
    assert (len(choice.tool_calls), choice.finish_reason) == (1, "tool_calls")


def test_without_tools_a_call_is_text(turn: Read) -> None:
    choice = turn(CALL, ask={"tools": None})
    assert (choice.content, choice.tool_calls, choice.errors, choice.finish_reason) == (CALL, (), (), "stop")


def test_a_cut_answer_says_so(turn: Read) -> None:
    assert turn("The answer", end=None, finish_reason="length").finish_reason == "length"


def test_the_callers_stop_is_not_shown(turn: Read) -> None:
    choice = turn("one\ntwo", ask={"stop": ["\n"]}, end=None, stop_reason="\n")
    assert (choice.content, choice.finish_reason) == ("one", "stop")


def test_logprobs_cover_the_message_and_not_its_end(turn: Read) -> None:
    choice = turn("aé", ask={"logprobs": True})
    assert choice.logprobs is not None
    tokens = choice.logprobs["content"]
    assert [(entry["token"], entry["bytes"]) for entry in tokens] == [("a", [97]), ("\ufffd", None), ("\ufffd", None)]
    assert tokens[0]["logprob"] == -0.5


def test_logprobs_are_absent_unless_asked_for(turn: Read) -> None:
    assert turn("a").logprobs is None
