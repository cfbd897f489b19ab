"""`/v1/responses` with the official client against a live server and a sampler that says what it is told.

Does not cover: how items become messages (`tests/unit/inference/test_response_items`), real models.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from app.core.settings import Settings
from app.db.engine import Database
from app.models.catalogue import Catalogue
from app.rendering.registry import load_renderer
from tests.api.fake_sampler import FakeSampler, error, register, serving
from tests.api.live_server import LiveServer
from tests.unit.inference.model import CALL, CONTEXT, LOOKUP

ASKED = "How much is the hat?"
TOOL: Any = {"type": "function", **LOOKUP["function"], "strict": True}  # type: ignore[dict-item]


def prompt_of(settings: Settings, messages: Any, tools: Any = None) -> list[int]:
    return load_renderer(Catalogue(settings.models_dir).get("bytes")).prompt(messages, tools)


def test_a_text_is_answered(client: OpenAI, sampler: FakeSampler, settings: Settings) -> None:
    answer = client.responses.create(
        model="bytes", input=ASKED, instructions="Be brief.", temperature=0, metadata={"a": "b"}
    )
    assert (answer.status, answer.output_text, answer.metadata) == ("completed", "84", {"a": "b"})
    assert [item.type for item in answer.output] == ["message"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASKED}]
    assert sampler.requests[0]["prompt"] == prompt_of(settings, messages)
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(prompt_of(settings, messages)), 3)
    assert answer.to_dict()["hone"] == {"policy": "bytes", "sampler": "smp-1", "invalid_calls": []}


def test_a_strict_client_accepts_every_kind_of_answer(sampler: FakeSampler, live_server: LiveServer) -> None:
    sampler.say = lambda request: f"Let me see.{CALL}{CALL}"
    with OpenAI(base_url=live_server.base_url, api_key=live_server.api_key, _strict_response_validation=True) as strict:
        whole = strict.responses.create(
            model="bytes", input=ASKED, tools=[TOOL], include=["message.output_text.logprobs"]
        )
        assert [item.type for item in whole.output] == ["message", "function_call", "function_call"]
        kinds = [event.type for event in strict.responses.create(model="bytes", input=ASKED, tools=[TOOL], stream=True)]
        assert kinds[-1] == "response.completed"


def test_a_tool_loop_renders_what_training_would(client: OpenAI, sampler: FakeSampler, settings: Settings) -> None:
    sampler.say = lambda request: f"Let me see.{CALL}"
    first = client.responses.create(model="bytes", input=ASKED, tools=[TOOL], parallel_tool_calls=False)
    call: Any = first.output[-1]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "lookup", {"item": "hat"})
    assert call.call_id.startswith("call_")
    assert sampler.requests[0]["stop"] == ["</tool_call>"]
    assert sampler.requests[0]["prompt"] == prompt_of(settings, [{"role": "user", "content": ASKED}], [LOOKUP])

    sampler.say = lambda request: "It costs 84."
    told: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "84"}
    history: Any = [{"role": "user", "content": ASKED}, *first.output, told]
    second = client.responses.create(model="bytes", input=history, tools=[TOOL])
    assert second.output_text == "It costs 84."
    function = {"name": "lookup", "arguments": call.arguments}
    messages = [
        {"role": "user", "content": ASKED},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [{"id": call.call_id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call.call_id, "content": "84"},
    ]
    assert sampler.requests[1]["prompt"] == prompt_of(settings, messages, [LOOKUP])


def test_chat_and_responses_put_the_same_tokens_before_the_model(client: OpenAI, sampler: FakeSampler) -> None:
    client.responses.create(model="bytes", input=[{"role": "user", "content": ASKED}], tools=[TOOL])
    client.chat.completions.create(model="bytes", messages=[{"role": "user", "content": ASKED}], tools=[LOOKUP])  # type: ignore[list-item]
    said = [{key: value for key, value in each.items() if key != "max_tokens"} for each in sampler.requests]
    assert said[0] == said[1]


def test_the_sdks_accumulator_reads_a_stream(client: OpenAI, sampler: FakeSampler) -> None:
    sampler.say = lambda request: f"Let me see.{CALL}"
    with client.responses.stream(model="bytes", input=ASKED, tools=[TOOL]) as stream:
        events: list[Any] = list(stream)
        final = stream.get_final_response()
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(13))
    assert final.output_text == "Let me see."
    assert final.id == events[0].response.id
    call: Any = final.output[1]
    assert (call.id, call.arguments) == (events[8].item.id, '{"item": "hat"}')
    assert final.usage is not None


def test_a_tuned_model_answers_with_its_adapter(client: OpenAI, sampler: FakeSampler, tuned: str) -> None:
    sampler.say = lambda request: request["model"]
    assert client.responses.create(model=tuned, input=ASKED).output_text == "ckpt-8"
    assert sampler.loaded == {"ckpt-8": "step-8"}


def test_an_answer_that_was_cut_is_incomplete(client: OpenAI, sampler: FakeSampler) -> None:
    sampler.say = lambda request: "a long story"
    whole = client.responses.create(model="bytes", input=ASKED, max_output_tokens=6)
    assert (whole.status, whole.output_text) == ("incomplete", "a long")
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    events = list(client.responses.create(model="bytes", input=ASKED, max_output_tokens=6, stream=True))
    assert events[-1].type == "response.incomplete"


def test_an_unreadable_call_is_shown_and_reported(client: OpenAI, sampler: FakeSampler) -> None:
    sampler.say = lambda request: "<tool_call>lookup hat</tool_call>"
    answer = client.responses.create(model="bytes", input=ASKED, tools=[TOOL])
    assert answer.output_text == "<tool_call>lookup hat</tool_call>"
    hone: Any = answer.to_dict()["hone"]
    assert hone["invalid_calls"] == [{"choice": 0, "error": "invalid JSON"}]


def test_what_cannot_be_honoured_is_refused_by_name(http: httpx.Client, sampler: FakeSampler) -> None:
    orphan = {"type": "function_call_output", "call_id": "call_1", "output": "84"}
    image = {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}
    bad: dict[str, Any] = {
        "previous_response_id": {"previous_response_id": "resp_1"},
        "conversation": {"conversation": "conv_1"},
        "prompt": {"prompt": {"id": "pmpt_1"}},
        "background": {"background": True},
        "truncation": {"truncation": "auto"},
        "text.format": {"text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}},
        "tool_choice": {"tool_choice": {"type": "function", "name": "lookup"}},
        "tools.0.type": {"tools": [{"type": "web_search"}]},
        "tools.0.name": {"tools": [{"type": "function", "name": "a b"}]},
        "top_logprobs": {"top_logprobs": 3},
        "input": {"input": []},
        "input.0.content": {"input": [image]},
        "input.0.role": {"input": [{"content": "hello"}]},
        "input.0.type": {"input": [{"type": "item_reference", "id": "msg_1"}]},
        "input.0.call_id": {"input": [orphan]},
        "input.0.arguments": {"input": [{"type": "function_call", "call_id": "c", "name": "f"}]},
        "max_output_tokens": {"max_output_tokens": 0},
        "model": {"model": None},
    }
    for param, fields in bad.items():
        answer = http.post("/v1/responses", json={"model": "bytes", "input": ASKED, **fields})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert sampler.requests == []


def test_a_refusal_says_why(client: OpenAI, sampler: FakeSampler) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="bytes", input=ASKED, previous_response_id="resp_1")
    assert "this server stores no responses; send the earlier items in input" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="bytes", input=ASKED, tools=[TOOL], tool_choice="required")
    assert "a call cannot be forced here" in caught.value.message


def test_a_prompt_beyond_the_context_is_named_as_such(client: OpenAI, sampler: FakeSampler) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="bytes", input="a" * CONTEXT)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")


def test_nothing_is_stored(client: OpenAI, sampler: FakeSampler) -> None:
    answer = client.responses.create(model="bytes", input=ASKED, store=True)
    with pytest.raises(openai.NotFoundError, match="stores no responses"):
        client.responses.retrieve(answer.id)


def test_unknown_models_and_strangers_get_the_same_404(
    client: OpenAI, live_server: LiveServer, sampler: FakeSampler, tuned: str, other_key: str
) -> None:
    with OpenAI(base_url=live_server.base_url, api_key=other_key, max_retries=0) as stranger:
        for caller, model in ((client, "ft:bytes:org:none:1"), (stranger, tuned)):
            with pytest.raises(openai.NotFoundError) as caught:
                caller.responses.create(model=model, input=ASKED, stream=True)
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_sampler_that_fails_once_is_asked_again_before_the_client_has_read_a_word(
    client: OpenAI, sampler: FakeSampler
) -> None:
    for stream in (False, True):
        failing = len(sampler.requests) + 1
        sampler.fail = lambda _, n=failing: error(500, "died", None) if len(sampler.requests) == n else None
        if stream:
            assert list(client.responses.create(model="bytes", input=ASKED, stream=True))[-1].type.endswith("completed")
        else:
            assert client.responses.create(model="bytes", input=ASKED).output_text == "84"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_sampler_that_dies_half_way_is_replaced_by_another(
    client: OpenAI, sampler: FakeSampler, tuned: str, database: Database, stream: bool
) -> None:
    asked: list[str] = []

    def die_first(name: str) -> Any:
        asked.append(name)
        return error(500, "engine died", None) if len(asked) == 1 else None

    with serving(FakeSampler(sampler.base, sampler.encode, sampler.end)) as other:
        await register(database, other, "smp-2")
        sampler.fail, other.fail = lambda _: die_first("smp-1"), lambda _: die_first("smp-2")
        if stream:
            last: Any = list(client.responses.create(model=tuned, input=ASKED, stream=True))[-1]
            answer = last.response
        else:
            answer = client.responses.create(model=tuned, input=ASKED)
        assert answer.output_text == "84"
        assert sorted(asked) == ["smp-1", "smp-2"]
        assert answer.to_dict()["hone"]["sampler"] == asked[1]
        assert sampler.loaded == other.loaded == {"ckpt-8": "step-8"}


async def test_a_failure_after_the_first_event_is_an_error_the_client_raises(
    async_client: AsyncOpenAI, sampler: FakeSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.inference.routes.KEEP_ALIVE_S", 0.05)
    sampler.hold_s = 0.3
    sampler.say = lambda request: str(1 / 0)  # it breaks while it answers
    seen: list[str] = []

    async def read() -> None:
        async for event in await async_client.responses.create(model="bytes", input=ASKED, stream=True):
            seen.append(event.type)

    with pytest.raises(openai.APIError, match="sampler failed twice"):
        await read()
    assert seen == ["response.created", "response.in_progress"]


def test_without_a_sampler_the_client_is_told_to_come_back(http: httpx.Client, silent: FakeSampler) -> None:
    answer = http.post("/v1/responses", json={"model": "bytes", "input": ASKED})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["error"]["code"] == "no_sampler"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_the_sampler(http: httpx.Client, sampler: FakeSampler, stream: bool) -> None:
    sampler.hold_s = 20.0
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/responses", json={"model": "bytes", "input": ASKED, "stream": stream}, timeout=0.5)
    assert sampler.abandoned.wait(5.0)
