"""A chat request through resolution, rendering, a scripted sampler and parsing.

Does not cover: HTTP, the database.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from app.core.errors import InvalidRequest, ServiceError, Unavailable
from app.inference.capacity import Gate
from app.inference.request import Ask, read
from app.inference.resolution import Target
from app.inference.schemas import ChatRequest
from app.inference.service import ChatService, DeadlineExceeded, SamplingFailed
from app.models.catalogue import BaseModel
from app.rendering.protocol import ChatRenderer
from app.samplers.client import Completion
from app.samplers.errors import (
    AdapterNotVisible,
    AdapterRefused,
    ModelNotServed,
    SamplerMisbehaved,
    SamplerRejected,
    SamplerUnavailable,
)
from app.samplers.service import Adapter
from tests.unit.inference.model import CONTEXT, LOOKUP, FakeClient, FakeSamplers, completion

USER = {"role": "user", "content": "How much is the hat?"}
DOWN = SamplerUnavailable("gone", url="http://s")


def ask(**fields: Any) -> Ask:
    return read(ChatRequest.model_validate({"model": "bytes", "messages": [USER], **fields}))


class OneTarget:
    """Every name is the same model."""

    def __init__(self, target: Target) -> None:
        self._target = target

    async def resolve(self, project_id: str, name: str) -> Target:
        return self._target


@pytest.fixture
def answered(encode: Callable[[str], list[int]], end: int) -> Completion:
    return completion(encode, "84", end=end, cached_tokens=7)


@pytest.fixture
def serve(base: BaseModel, renderer: ChatRenderer) -> Callable[..., ChatService]:
    def made(samplers: FakeSamplers, adapter: Adapter | None = None, **given: Any) -> ChatService:
        resolver: Any = OneTarget(Target(base, adapter, renderer))
        return ChatService(resolver, samplers, **{"max_model_len": CONTEXT, **given})  # type: ignore[arg-type]

    return made


async def test_the_sampler_gets_the_ids_that_training_would_use(
    serve: Any, answered: Completion, renderer: ChatRenderer
) -> None:
    client = FakeClient([answered])
    answer = await serve(FakeSamplers(client)).answer("p", ask(tools=[LOOKUP]))
    (request,) = client.requests
    assert request.prompt_ids == renderer.prompt([USER], [LOOKUP])
    assert request.stop_token_ids == renderer.stop_token_ids
    assert answer.choices[0].content == "84"
    assert (answer.prompt_tokens, answer.cached_tokens) == (len(request.prompt_ids), 7)


async def test_a_checkpoint_is_served_by_its_adapter(serve: Any, answered: Completion) -> None:
    client, adapter = FakeClient([answered]), Adapter("ckpt-1", "/adapters/1")
    samplers = FakeSamplers(client)
    answer = await serve(samplers, adapter).answer("p", ask())
    assert samplers.acquired == [("bytes", adapter)]
    assert (client.requests[0].model, answer.policy, answer.sampler) == ("ckpt-1", "ckpt-1", "smp-1")


async def test_sampling_fields_reach_the_sampler(serve: Any, answered: Completion) -> None:
    client = FakeClient([answered])
    wanted = {"temperature": 0.0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 5}
    await serve(FakeSamplers(client)).answer("p", ask(**wanted, stop=["x"], max_tokens=9))
    sent = client.requests[0]
    assert {name: getattr(sent, name) for name in wanted} == wanted
    assert (sent.stop, sent.max_tokens) == (("x",), 9)


async def test_without_parallel_calls_the_turn_ends_after_the_first(serve: Any, answered: Completion) -> None:
    client = FakeClient([answered] * 3)
    service = serve(FakeSamplers(client))
    for fields in (
        {"tools": [LOOKUP]},
        {"tools": [LOOKUP], "parallel_tool_calls": False},
        {"parallel_tool_calls": False},
    ):
        await service.answer("p", ask(**fields))
    assert [request.stop for request in client.requests] == [(), ("</tool_call>",), ()]


@pytest.mark.parametrize(("asked", "sent"), [(None, 1024), (5000, "room"), (1, 1)])
async def test_the_answer_never_outgrows_the_context(serve: Any, answered: Completion, asked: Any, sent: Any) -> None:
    client = FakeClient([answered])
    await serve(FakeSamplers(client)).answer("p", ask(max_tokens=asked))
    room = CONTEXT - len(client.requests[0].prompt_ids)
    assert client.requests[0].max_tokens == (room if sent == "room" else sent)


async def test_a_prompt_beyond_the_context_is_refused(serve: Any) -> None:
    service = serve(FakeSamplers(FakeClient([])), max_model_len=64)
    with pytest.raises(InvalidRequest) as caught:
        await service.answer("p", ask(messages=[{"role": "user", "content": "a" * 64}]))
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


async def test_choices_are_requests_of_their_own(serve: Any, answered: Completion) -> None:
    client = FakeClient([answered] * 3)
    answer = await serve(FakeSamplers(client)).answer("p", ask(n=3, seed=7))
    assert [request.seed for request in client.requests] == [7, 8, 9]
    assert len(answer.choices) == 3


async def test_an_engine_that_a_seed_would_end_gets_none(serve: Any, answered: Completion) -> None:
    client = FakeClient([answered])
    samplers = FakeSamplers(client)
    samplers.sampler.info["seeds"] = False
    await serve(samplers).answer("p", ask(seed=7))
    assert [request.seed for request in client.requests] == [None]


async def test_one_failed_choice_ends_its_siblings(serve: Any) -> None:
    async def hang(_: Any) -> Completion:
        await asyncio.Event().wait()
        raise AssertionError

    client = FakeClient([hang, SamplerMisbehaved("odd", url="")])
    with pytest.raises(SamplingFailed):
        await serve(FakeSamplers(client)).answer("p", ask(n=2))
    await asyncio.sleep(0)
    assert client.cancelled == 1


@pytest.mark.parametrize("failure", [DOWN, ModelNotServed("no such model", url="")])
async def test_a_sampler_that_fails_is_tried_once_more(serve: Any, answered: Completion, failure: Exception) -> None:
    samplers = FakeSamplers(FakeClient([failure, answered]))
    answer = await serve(samplers).answer("p", ask())
    assert answer.choices[0].content == "84"
    assert (len(samplers.acquired), samplers.forgotten) == (2, 1)


async def test_an_aborted_answer_is_not_an_answer(serve: Any, answered: Completion, encode: Any) -> None:
    cut = completion(encode, "8", finish_reason="abort")
    answer = await serve(FakeSamplers(FakeClient([cut, answered]))).answer("p", ask())
    assert answer.choices[0].content == "84"


async def test_two_failures_are_a_503_with_the_reason(serve: Any) -> None:
    with pytest.raises(Unavailable, match="gone") as caught:
        await serve(FakeSamplers(FakeClient([DOWN, DOWN]))).answer("p", ask())
    assert caught.value.retry_after_s == 5.0


HIDDEN = ("/srv/hone", "http://gpu-3:8101")


@pytest.mark.parametrize(
    "failure",
    [
        AdapterNotVisible("/srv/hone/adapters/1", "/mnt/hone/adapters/1", url="http://gpu-3:8101"),
        AdapterRefused("No adapter found for /srv/hone/adapters/1", url="http://gpu-3:8101"),
        SamplerMisbehaved("the answer has no choices", url="http://gpu-3:8101"),
        SamplerRejected("temperature is too high", url="http://gpu-3:8101", param="temperature"),
        SamplerUnavailable("POST /v1/completions: no answer", url="http://gpu-3:8101"),
    ],
)
async def test_a_caller_learns_neither_addresses_nor_paths_and_the_operator_does(
    serve: Any, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ServiceError) as caught:
        await serve(FakeSamplers(FakeClient([failure] * 2)), Adapter("ckpt-1", "/srv/hone/1")).answer("p", ask())
    assert not [word for word in HIDDEN if word in str(caught.value)]
    logged = "".join(str(vars(record).get("ctx")) for record in caplog.records)
    assert str(failure) in logged or isinstance(failure, SamplerRejected)


async def test_no_sampler_is_a_503_at_once(serve: Any) -> None:
    with pytest.raises(Unavailable, match="one is starting") as caught:
        await serve(FakeSamplers(None)).answer("p", ask())
    assert (caught.value.code, caught.value.retry_after_s) == ("no_sampler", 5.0)


@pytest.mark.parametrize(
    ("param", "kind", "shown"),
    [
        ("input_tokens", InvalidRequest, "messages"),
        ("temperature", InvalidRequest, "temperature"),
        (None, SamplingFailed, None),
    ],
)
async def test_a_refusal_is_the_callers_only_where_it_names_his_field(
    serve: Any, param: str | None, kind: type[Exception], shown: str | None
) -> None:
    client = FakeClient([SamplerRejected("no", url="", param=param)])
    with pytest.raises(kind) as caught:
        await serve(FakeSamplers(client)).answer("p", ask())
    assert getattr(caught.value, "param", None) == shown
    assert len(client.requests) == 1


async def test_a_request_has_a_deadline(serve: Any) -> None:
    async def hang(_: Any) -> Completion:
        await asyncio.Event().wait()
        raise AssertionError

    client = FakeClient([hang])
    with pytest.raises(DeadlineExceeded):
        await serve(FakeSamplers(client), deadline_s=0.2).answer("p", ask())
    assert client.cancelled == 1


async def test_more_requests_than_fit_wait_and_the_rest_come_back_later(serve: Any, answered: Completion) -> None:
    release = asyncio.Event()

    async def when_released(_: Any) -> Completion:
        await release.wait()
        return answered

    service = serve(FakeSamplers(FakeClient([when_released] * 2)), gate=Gate(limit=1, queue=1))
    first, second = (asyncio.create_task(service.answer("p", ask())) for _ in range(2))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable) as caught:
        await service.answer("p", ask())
    assert caught.value.code == "overloaded"
    release.set()
    assert len(await asyncio.gather(first, second)) == 2


async def test_a_request_cancelled_in_the_queue_leaves_its_place() -> None:
    gate, held = Gate(limit=1, queue=1), asyncio.Event()

    async def hold() -> None:
        async with gate.enter():
            held.set()
            await asyncio.Event().wait()

    holder, queued = asyncio.create_task(hold()), asyncio.create_task(hold())
    await held.wait()
    for task in (queued, holder):
        task.cancel()
    await asyncio.gather(holder, queued, return_exceptions=True)
    async with asyncio.timeout(1), gate.enter():
        pass
