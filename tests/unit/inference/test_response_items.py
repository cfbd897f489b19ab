"""Which chat messages the items of a response become, and what comes back for a choice.

Does not cover: HTTP and the official client (`tests/api/test_responses`).
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.core.errors import InvalidRequest
from app.inference.request import Ask
from app.inference.responses.answer import ResponseEvents, finished, started
from app.inference.responses.request import read
from app.inference.responses.schemas import ResponsesRequest
from app.inference.service import Answer
from app.inference.turns import Choice

USER = {"role": "user", "content": "How much?"}


def request(**fields: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"model": "m", "input": "How much?", **fields})


def ask(*items: dict[str, Any], **fields: Any) -> Ask:
    return read(request(input=list(items), **fields))


def call(call_id: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": "lookup", "arguments": "{}", **fields}


def told(call_id: str, output: Any = "84") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def chat_call(call_id: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "lookup", "arguments": "{}"}}


def test_a_string_is_one_message_of_the_user_and_instructions_come_first() -> None:
    made = read(request(instructions="Be brief."))
    assert made.messages == ({"role": "system", "content": "Be brief."}, USER)


def test_null_is_the_same_as_absent() -> None:
    names = [name for name, field in ResponsesRequest.model_fields.items() if not field.is_required()]
    assert read(request(**dict.fromkeys(names))) == read(request())


def test_parts_are_joined() -> None:
    parts = [{"type": "input_text", "text": "How "}, {"type": "input_text", "text": "much?"}]
    assert ask({"type": "message", "role": "user", "content": parts}).messages == (USER,)
    said = [{"type": "output_text", "text": "84", "annotations": []}, {"type": "refusal", "refusal": "!"}]
    assert ask({"role": "assistant", "content": said}).messages == ({"role": "assistant", "content": "84!"},)


def test_what_the_model_wrote_in_one_turn_is_one_message() -> None:
    reasoning = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "Hm"}],
    }
    text = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]}
    made = ask(USER, reasoning, text, call("a"), call("b"), told("a"), told("b"), call("c"), told("c", []))
    assert made.messages == (
        USER,
        {
            "role": "assistant",
            "reasoning_content": "Hm",
            "content": "Let me see.",
            "tool_calls": [chat_call("a"), chat_call("b")],
        },
        {"role": "tool", "content": "84", "tool_call_id": "a"},
        {"role": "tool", "content": "84", "tool_call_id": "b"},
        {"role": "assistant", "tool_calls": [chat_call("c")]},
        {"role": "tool", "content": "", "tool_call_id": "c"},
    )


def test_a_call_after_the_user_opens_a_turn_of_its_own_and_reasoning_does_not_cross_it() -> None:
    reasoning = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm"}]}
    made = ask({"role": "assistant", "content": "Hello."}, reasoning, USER, call("a"))
    assert made.messages[2] == {"role": "assistant", "tool_calls": [chat_call("a")]}


def test_an_output_without_its_call_is_refused_with_its_place() -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(call("a"), told("b"))
    assert caught.value.param == "input.1.call_id"


def test_a_fault_in_a_message_has_the_callers_name_for_it() -> None:
    made = ask(USER, call("a"), call("b"), told("b"), instructions="x")
    assert made.field("messages.3.content") == "input.3.content"
    assert made.field("messages.0.content") == "instructions.content"
    assert made.field("messages") == "input"
    assert made.field("max_tokens") == "max_tokens"


def test_a_flat_tool_is_the_chat_tool_with_its_key_order() -> None:
    sent = '{"type": "function", "parameters": {"type": "object"}, "strict": true, "name": "f", "output_schema": null}'
    made = read(request(tools=[json.loads(sent)]))
    assert json.dumps(made.tools) == (
        '[{"type": "function", "function": {"parameters": {"type": "object"}, "name": "f"}}]'
    )
    assert read(request(tools=[json.loads(sent)], tool_choice="none")).tools is None


def answer(**fields: Any) -> Answer:
    values = {
        "content": "84",
        "reasoning": None,
        "tool_calls": (),
        "errors": (),
        "finish_reason": "stop",
        "logprobs": None,
        "completion_tokens": 3,
    }
    return Answer((Choice(**{**values, **fields}),), 10, 4, "ckpt-1", "smp-1")


def test_reasoning_text_and_calls_come_in_the_order_they_were_written() -> None:
    asked = request(reasoning={"effort": "low"})
    made = finished(
        started(asked, read(asked)),
        answer(reasoning="Hm", tool_calls=(chat_call("a"),), finish_reason="tool_calls"),
    )
    assert [item["type"] for item in made["output"]] == ["reasoning", "message", "function_call"]
    assert (made["status"], made["reasoning"]) == ("completed", {"effort": "low", "summary": None})
    assert made["usage"] is not None
    assert (made["usage"]["total_tokens"], made["usage"]["input_tokens_details"]["cached_tokens"]) == (13, 4)


def test_a_call_alone_has_no_empty_message() -> None:
    made = finished(started(request(), read(request())), answer(content=None, tool_calls=(chat_call("a"),)))
    assert [item["type"] for item in made["output"]] == ["function_call"]


def test_events_add_up_to_the_object_that_ends_them() -> None:
    wire = ResponseEvents(started(request(), read(request())))
    sent = [*wire.head(), *wire.body(answer(reasoning="Hm", tool_calls=(chat_call("a"),)))]
    events = [json.loads(each.split(b"data: ", 1)[1]) for each in sent]
    assert [each.split(b"\n", 1)[0].decode() for each in sent] == [f"event: {event['type']}" for event in events]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    assert [event["delta"] for event in events if event["type"].endswith(".delta")] == ["Hm", "84", "{}"]
