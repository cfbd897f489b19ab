"""The client believes nothing it has not checked, sends every sampling field, and types each failure."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from app.samplers.client import CompletionRequest, SamplerClient
from app.samplers.errors import AdapterRefused, ModelNotServed, SamplerMisbehaved, SamplerRejected, SamplerUnavailable

Handler = Callable[[httpx.Request], httpx.Response]


def client(handler: Handler) -> SamplerClient:
    return SamplerClient(httpx.AsyncClient(transport=httpx.MockTransport(handler)), "http://sampler/")


def answer(**changes: Any) -> dict[str, Any]:
    choice = {
        "text": "ab",
        "token_ids": [5, 6],
        "logprobs": {"token_logprobs": [-0.5, -1.0]},
        "finish_reason": "stop",
        "stop_reason": 6,
    }
    choice |= changes.pop("choice", {})
    usage = {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
    return {"model": "job-v1", "choices": [choice], "usage": usage} | changes


def answering(body: Any, status: int = 200) -> Handler:
    return lambda _: httpx.Response(status, json=body)


ASK = CompletionRequest("job-v1", [1, 2, 3], 8, timeout_s=5)


def test_no_failure_of_a_sampler_shows_the_credentials_in_its_url() -> None:
    error = SamplerUnavailable("gone", url="https://user:sesame@gpu.example:8000/v1?key=sesame")
    assert (str(error), error.url) == ("gone (https://gpu.example:8000/v1?…)", "https://gpu.example:8000/v1?…")


async def test_a_completion_carries_what_the_trainer_needs() -> None:
    done = await client(answering(answer())).complete(ASK)
    assert (done.token_ids, done.log_probs, done.finish_reason, done.stop_reason) == ((5, 6), (-0.5, -1.0), "stop", 6)
    assert (done.prompt_tokens, done.cached_tokens) == (3, 2)


async def test_every_sampling_field_is_sent_so_that_no_default_decides() -> None:
    sent: dict[str, Any] = {}

    def handler(request: httpx.Request) -> httpx.Response:
        sent.update(json.loads(request.content))
        return httpx.Response(200, json=answer())

    await client(handler).complete(ASK)
    explicit = {"model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n", "max_tokens", "prompt"}
    assert explicit <= sent.keys()
    assert sent["logprobs"] == 0
    assert sent["return_token_ids"] is True


@pytest.mark.parametrize(
    "body",
    [
        answer(model="base"),
        answer(choices=[]),
        answer(choice={"token_ids": [5]}),
        answer(choice={"token_ids": [], "logprobs": {"token_logprobs": []}}),
        answer(choice={"logprobs": None}),
        answer(choice={"logprobs": {"token_logprobs": [-0.5, None]}}),
        answer(choice={"finish_reason": None}),
        answer(choice={"prompt_token_ids": [1, 2, 4]}),
        answer(usage=None),
        ["not an object"],
    ],
)
async def test_an_answer_that_breaks_the_protocol_is_not_believed(body: Any) -> None:
    with pytest.raises(SamplerMisbehaved):
        await client(answering(body)).complete(ASK)


async def test_an_aborted_answer_may_be_empty() -> None:
    aborted = {"token_ids": [], "logprobs": {"token_logprobs": []}, "finish_reason": "abort"}
    assert (await client(answering(answer(choice=aborted))).complete(ASK)).finish_reason == "abort"


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, SamplerRejected),
        (404, ModelNotServed),
        (429, SamplerUnavailable),
        (500, SamplerUnavailable),
        (503, SamplerUnavailable),
    ],
)
async def test_a_status_decides_what_the_caller_may_do(status: int, error: type[Exception]) -> None:
    body = {"error": {"message": "no", "type": "X", "param": "input_tokens", "code": status}}
    with pytest.raises(error) as caught:
        await client(answering(body, status)).complete(ASK)
    if isinstance(caught.value, SamplerRejected):
        assert caught.value.param == "input_tokens"


async def test_a_non_finite_answer_is_the_weights_fault_and_not_the_requests() -> None:
    body = {"error": {"message": "Out of range float values are not JSON compliant", "code": 400}}
    with pytest.raises(SamplerMisbehaved):
        await client(answering(body, 400)).complete(ASK)


@pytest.mark.parametrize(
    "fault", [httpx.ConnectError("refused"), httpx.RemoteProtocolError("cut"), httpx.ReadTimeout("slow")]
)
async def test_a_broken_connection_or_a_deadline_is_unavailable(fault: Exception) -> None:
    def handler(_: httpx.Request) -> httpx.Response:
        raise fault

    with pytest.raises(SamplerUnavailable, match="http://sampler"):
        await client(handler).complete(ASK)
    assert not await client(handler).health()


async def test_a_server_that_trickles_is_cut_off_at_the_deadline() -> None:
    async def handler(_: httpx.Request) -> httpx.Response:
        await asyncio.sleep(30)
        return httpx.Response(200)

    http = httpx.AsyncClient(transport=httpx.MockTransport(handler))
    with pytest.raises(SamplerUnavailable):
        await SamplerClient(http, "http://sampler").complete(CompletionRequest("job-v1", [1], 1, timeout_s=0.05))


async def test_a_score_has_one_value_for_each_position_after_the_first() -> None:
    rows = [None, {"2": {"logprob": -0.1}}, {"3": {"logprob": -0.2}}]
    assert await client(answering(answer(choice={"prompt_logprobs": rows}))).score("job-v1", [1, 2, 3]) == [-0.1, -0.2]


@pytest.mark.parametrize("rows", [None, [None], [None, {"9": {"logprob": -1}}, {"3": {"logprob": -1}}]])
async def test_a_score_for_other_tokens_is_not_believed(rows: Any) -> None:
    with pytest.raises(SamplerMisbehaved):
        await client(answering(answer(choice={"prompt_logprobs": rows}))).score("job-v1", [1, 2, 3])


async def test_the_prompt_that_was_computed_is_the_one_that_was_sent() -> None:
    told = answer(choice={"prompt_token_ids": [1, 2, 3], "prompt_logprobs": [None, {"2": {"logprob": -1}}]})
    assert (await client(answering(told)).complete(ASK)).prompt_tokens == 3
    with pytest.raises(SamplerMisbehaved, match="prompt_token_ids"):
        await client(answering(told)).score("job-v1", [1, 2])


@pytest.mark.parametrize(("health", "error"), [(200, AdapterRefused), (503, SamplerUnavailable)])
async def test_files_that_a_healthy_engine_cannot_load_are_the_files_fault(health: int, error: type[Exception]) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(health if request.url.path == "/health" else 500, json={"error": {"message": "rank 64"}})

    with pytest.raises(error, match="rank 64") as caught:
        await client(handler).load_adapter("job-v1", "/adapters/v1")
    assert type(caught.value) is error


async def test_metrics_come_as_the_text_they_are() -> None:
    text = "vllm:num_requests_running 3\n"
    assert await client(lambda _: httpx.Response(200, text=text)).metrics() == text
    with pytest.raises(ModelNotServed):
        await client(lambda _: httpx.Response(404, text="no")).metrics()
