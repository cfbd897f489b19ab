"""What a chat request means, and which ones are refused with which field.

Does not cover: the answer.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from app.core.errors import InvalidRequest
from app.inference.request import Ask, read
from app.inference.schemas import ChatRequest

USER = {"role": "user", "content": "How much is the hat?"}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "lookup", "arguments": "{}"}}],
}


def ask(**fields: Any) -> Ask:
    return read(ChatRequest.model_validate({"model": "m", "messages": [USER], **fields}))


def test_a_bare_request_samples_the_plain_distribution() -> None:
    made = ask()
    assert (made.sampling.temperature, made.sampling.top_p, made.sampling.top_k) == (1.0, 1.0, 0)
    assert (made.sampling.min_p, made.sampling.repetition_penalty, made.sampling.seed) == (0.0, 1.0, None)
    assert (made.n, made.max_tokens, made.tools, made.stop, made.parallel) == (1, None, None, (), True)


def test_null_is_the_same_as_absent() -> None:
    names = [name for name, field in ChatRequest.model_fields.items() if not field.is_required()]
    assert ask(**dict.fromkeys(names)) == ask()


def test_unknown_fields_are_ignored() -> None:
    assert ask(store=True, metadata={"a": "b"}, verbosity="low", prediction={"type": "content"}) == ask()


def test_temperature_zero_stays_zero() -> None:
    assert ask(temperature=0).sampling.temperature == 0.0


def test_tools_go_to_the_model_exactly_as_they_were_sent() -> None:
    sent = '[{"function": {"parameters": {"type": "object"}, "x": 1, "name": "lookup"}, "type": "function", "z": null}]'
    made = ask(tools=json.loads(sent))
    assert json.dumps(made.tools) == sent


def test_tool_choice_none_hides_the_tools() -> None:
    tool = {"type": "function", "function": {"name": "lookup"}}
    assert ask(tools=[tool], tool_choice="auto").tools == (tool,)
    assert ask(tools=[tool], tool_choice="none").tools is None


def test_one_stop_is_a_list_of_one() -> None:
    assert ask(stop="\n").stop == ("\n",)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "How much "}, {"type": "text", "text": "is it?"}]
    assert ask(messages=[{"role": "user", "content": parts}]).messages[0]["content"] == "How much is it?"


def test_a_conversation_with_calls_keeps_their_ids() -> None:
    answer = {"role": "tool", "tool_call_id": "call_1", "content": "84"}
    made = ask(messages=[USER, CALLED, answer])
    assert made.messages[1]["tool_calls"] == CALLED["tool_calls"]
    assert made.messages[2] == answer


def test_choices_get_seeds_of_their_own() -> None:
    sampling = ask(seed=-1, n=2).sampling
    assert [sampling.seed_of(0), sampling.seed_of(1)] == [2**63 - 1, 0]
    assert ask().sampling.seed_of(3) is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"logprobs": True, "top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": [{"role": "tool", "tool_call_id": "call_9", "content": ""}]}, "messages.0.tool_call_id"),
        ({"messages": [USER, {**CALLED, "role": "user"}]}, "messages.1.tool_calls"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages.1.content"),
    ],
)
def test_what_would_be_ignored_or_makes_no_sense_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"messages": []}, ("messages",)),
        ({"messages": [{"role": "robot", "content": ""}]}, ("messages", 0, "role")),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ("messages", 0, "content")),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, ("tools", 0, "function", "name")),
        ({"tools": [{"type": "custom", "custom": {}}]}, ("tools", 0, "type")),
        ({"tool_choice": "required"}, ("tool_choice",)),
        ({"tool_choice": {"type": "function", "function": {"name": "lookup"}}}, ("tool_choice",)),
        ({"response_format": {"type": "json_object"}}, ("response_format", "type")),
        ({"n": 9}, ("n",)),
        ({"temperature": 2.1}, ("temperature",)),
        ({"max_tokens": 0}, ("max_tokens",)),
        ({"stop": ["a", "b", "c", "d", "e"]}, ("stop",)),
        ({"stop": [""]}, ("stop", 0)),
        ({"seed": 2**63}, ("seed",)),
    ],
)
def test_a_field_of_the_wrong_shape_is_named(fields: dict[str, Any], where: tuple[str | int, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        ask(**fields)
    assert caught.value.errors()[0]["loc"][: len(where)] == where
