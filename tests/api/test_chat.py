"""Chat completions with the official client against a live server and a sampler that says what it is told.

Does not cover: real models (`tests/e2e`).
"""

from __future__ import annotations

import asyncio
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
from app.samplers.repository import wants
from tests.api.fake_sampler import FakeSampler, error
from tests.api.live_server import LiveServer
from tests.unit.inference.model import CALL, CONTEXT, LOOKUP

MESSAGES: Any = [{"role": "user", "content": "How much is the hat?"}]
TOOLS: Any = [LOOKUP]


def prompt_of(settings: Settings, messages: Any, tools: Any = None) -> list[int]:
    return load_renderer(Catalogue(settings.models_dir).get("bytes")).prompt(messages, tools)


def test_a_base_model_answers(client: OpenAI, sampler: FakeSampler, settings: Settings) -> None:
    completion = client.chat.completions.create(model="bytes", messages=MESSAGES, temperature=0, max_tokens=8)
    assert completion.choices[0].message.content == "84"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len(prompt_of(settings, MESSAGES))
    assert completion.usage.completion_tokens == 3
    assert completion.to_dict()["hone"] == {"policy": "bytes", "sampler": "smp-1", "invalid_calls": []}
    assert sampler.requests[0]["prompt"] == prompt_of(settings, MESSAGES)


def test_a_strict_client_accepts_the_answer(client: OpenAI, sampler: FakeSampler, live_server: LiveServer) -> None:
    with OpenAI(base_url=live_server.base_url, api_key=live_server.api_key, _strict_response_validation=True) as strict:
        assert strict.chat.completions.create(model="bytes", messages=MESSAGES).choices[0].message.content == "84"


def test_tuned_model_and_checkpoint_have_adapters_of_their_own(
    client: OpenAI, sampler: FakeSampler, tuned: str
) -> None:
    sampler.say = lambda request: request["model"]
    said = {
        name: client.chat.completions.create(model=name, messages=MESSAGES).choices[0].message.content
        for name in ("bytes", tuned, f"{tuned}:ckpt-step-4")
    }
    assert list(said.values()) == ["bytes", "ckpt-8", "ckpt-4"]
    assert sampler.loaded == {"ckpt-8": "step-8", "ckpt-4": "step-4"}


def test_a_tool_loop(client: OpenAI, sampler: FakeSampler, settings: Settings) -> None:
    sampler.say = lambda request: CALL
    first = client.chat.completions.create(model="bytes", messages=MESSAGES, tools=TOOLS, parallel_tool_calls=False)
    assert first.choices[0].finish_reason == "tool_calls"
    assert first.choices[0].message.content is None
    assert first.choices[0].message.tool_calls is not None
    call: Any = first.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"item": "hat"}
    assert sampler.requests[0]["stop"] == ["</tool_call>"]

    sampler.say = lambda request: "It costs 84."
    history = [
        *MESSAGES,
        first.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "84"},
    ]
    second = client.chat.completions.create(model="bytes", messages=history, tools=TOOLS)
    assert second.choices[0].message.content == "It costs 84."
    assert sampler.requests[1]["prompt"] == prompt_of(settings, history, TOOLS)


def test_an_unreadable_call_is_shown_and_reported(client: OpenAI, sampler: FakeSampler) -> None:
    sampler.say = lambda request: "<tool_call>lookup hat</tool_call>"
    completion = client.chat.completions.create(model="bytes", messages=MESSAGES, tools=TOOLS)
    assert completion.choices[0].message.content == "<tool_call>lookup hat</tool_call>"
    assert completion.choices[0].finish_reason == "stop"
    hone: Any = completion.to_dict()["hone"]
    assert hone["invalid_calls"] == [{"choice": 0, "error": "invalid JSON"}]


def test_choices_and_logprobs(client: OpenAI, sampler: FakeSampler) -> None:
    completion = client.chat.completions.create(model="bytes", messages=MESSAGES, n=2, logprobs=True)
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert completion.choices[1].logprobs is not None
    assert completion.choices[1].logprobs.content is not None
    assert [entry.token for entry in completion.choices[1].logprobs.content] == ["8", "4"]
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 6


def test_a_stream_has_text_finish_and_usage(client: OpenAI, sampler: FakeSampler) -> None:
    stream = client.chat.completions.create(
        model="bytes", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert [chunk.choices[0].delta.role for chunk in chunks[:1]] == ["assistant"]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "84"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_sdks_accumulator_reads_a_streamed_call(client: OpenAI, sampler: FakeSampler) -> None:
    sampler.say = lambda request: f"Let me see.{CALL}{CALL}"
    with client.chat.completions.stream(model="bytes", messages=MESSAGES, tools=TOOLS) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert message.content == "Let me see."
    assert message.tool_calls is not None
    assert [call.function.name for call in message.tool_calls] == ["lookup", "lookup"]


def test_an_early_failure_of_a_stream_has_its_status(client: OpenAI, sampler: FakeSampler) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nothing", messages=MESSAGES, stream=True)


def test_an_unknown_model_is_a_404(client: OpenAI, sampler: FakeSampler) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="ft:bytes:org:none:1", messages=MESSAGES)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_another_project_does_not_see_the_model(
    live_server: LiveServer, sampler: FakeSampler, tuned: str, other_key: str
) -> None:
    with (
        OpenAI(base_url=live_server.base_url, api_key=other_key, max_retries=0) as other,
        pytest.raises(openai.NotFoundError),
    ):
        other.chat.completions.create(model=tuned, messages=MESSAGES)


def test_bad_input_names_its_field(http: httpx.Client, sampler: FakeSampler) -> None:
    bad: dict[str, Any] = {
        "messages": {"messages": []},
        "messages.0.content": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.tool_call_id": {"messages": [{"role": "tool", "tool_call_id": "call_1", "content": "84"}]},
        "tool_choice": {"tool_choice": "required"},
        "response_format.type": {"response_format": {"type": "json_object"}},
        "top_logprobs": {"top_logprobs": 3, "logprobs": True},
        "n": {"n": 9},
        "stop": {"stop": ["a"] * 5},
        "stop.0": {"stop": "\ud800"},
        "model": {"model": "\ud800"},
        "tools.0.function.name": {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "temperature": {"temperature": "hot"},
    }
    for param, fields in bad.items():
        body = json.dumps({"model": "bytes", "messages": MESSAGES, **fields})
        answer = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert sampler.requests == []


def test_a_prompt_beyond_the_context_is_named_as_such(client: OpenAI, sampler: FakeSampler) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="bytes", messages=[{"role": "user", "content": "a" * CONTEXT}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_half_a_character_in_a_message_or_a_tool_is_read_somehow(http: httpx.Client, sampler: FakeSampler) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "\ud800", "parameters": {"a": "\ud800"}}}
    message = {"role": "user", "content": "\ud800"}
    body = json.dumps({"model": "bytes", "messages": [message], "tools": [tool]})
    answer = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text


async def test_without_a_sampler_the_keeper_is_asked_and_the_client_told_to_come_back(
    http: httpx.Client, silent: FakeSampler, database: Database
) -> None:
    answer = http.post("/v1/chat/completions", json={"model": "bytes", "messages": MESSAGES})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["error"]["code"] == "no_sampler"
    async with database.read() as session:
        assert await wants(session) == ["bytes"]


def test_a_sampler_that_fails_once_is_asked_again(client: OpenAI, sampler: FakeSampler) -> None:
    sampler.fail = lambda request: error(500, "engine died", None) if len(sampler.requests) == 1 else None
    assert client.chat.completions.create(model="bytes", messages=MESSAGES).choices[0].message.content == "84"


def test_a_sampler_that_refuses_our_request_is_not_asked_again(http: httpx.Client, sampler: FakeSampler) -> None:
    sampler.fail = lambda request: error(400, "id out of vocabulary", "prompt")
    answer = http.post("/v1/chat/completions", json={"model": "bytes", "messages": MESSAGES})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (500, "false")
    assert len(sampler.requests) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_the_sampler(http: httpx.Client, sampler: FakeSampler, stream: bool) -> None:
    sampler.hold_s = 20.0
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/chat/completions", json={"model": "bytes", "messages": MESSAGES, "stream": stream}, timeout=0.5)
    assert sampler.abandoned.wait(5.0)


async def test_two_hundred_at_once(async_client: AsyncOpenAI, sampler: FakeSampler, tuned: str) -> None:
    async def one() -> str | None:
        completion = await async_client.chat.completions.create(model=tuned, messages=MESSAGES, tools=TOOLS)
        return completion.choices[0].message.content

    assert await asyncio.gather(*(one() for _ in range(200))) == ["84"] * 200
    assert sampler.loaded == {"ckpt-8": "step-8"}
