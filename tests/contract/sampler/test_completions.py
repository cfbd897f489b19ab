"""What a sampler answers to /v1/completions: tokens, log-probs, stops, scores, and the errors of a wrong request."""

import math
from typing import Any

import pytest

from app.net.clients import HttpClient
from app.samplers.client import CompletionRequest, SamplerClient
from app.samplers.errors import ModelNotServed, SamplerRejected
from tests.contract.sampler.servers import Target, teacher_forced

pytestmark = pytest.mark.timeout(300)  # the first test of an engine starts it

PROMPT = [10, 11, 12, 13, 14, 15]


def ask(**fields: Any) -> CompletionRequest:
    return CompletionRequest(**{"model": "base", "prompt_ids": PROMPT, "max_tokens": 12, "timeout_s": 30} | fields)


async def post(http: HttpClient, target: Target, **fields: Any) -> tuple[int, dict[str, Any]]:
    body = {"model": "base", "prompt": PROMPT, "max_tokens": 4, "logprobs": 0, "return_token_ids": True, **fields}
    response = await http.post(f"{target.url}/v1/completions", json=body)
    return response.status_code, response.json()


async def test_it_is_healthy_and_lists_the_base_model(client: SamplerClient, target: Target) -> None:
    assert await client.health()
    base = next(m for m in await client.models() if m.id == "base")
    assert base.max_model_len == target.max_length
    assert base.parent is None


async def test_a_completion_has_an_id_and_a_log_prob_for_every_token(http: HttpClient, target: Target) -> None:
    status, body = await post(http, target, request_id="ep7-t2", ignore_eos=True)
    choice = body["choices"][0]
    assert status == 200
    assert body["id"].startswith("cmpl-ep7-t2")
    assert choice["prompt_token_ids"] == PROMPT
    assert len(choice["token_ids"]) == len(choice["logprobs"]["token_logprobs"]) == 4
    assert body["usage"]["prompt_tokens"] == 6
    assert body["usage"]["completion_tokens"] == 4


async def test_without_logprobs_the_field_is_null_and_ids_still_come(http: HttpClient, target: Target) -> None:
    _, body = await post(http, target, logprobs=None)
    assert body["choices"][0]["logprobs"] is None
    assert body["choices"][0]["token_ids"]


async def test_sampled_log_probs_equal_scored_ones_and_the_reference(client: SamplerClient, reference: Any) -> None:
    done = await client.complete(ask(max_tokens=40, prompt_ids=list(range(20, 120))))
    ids = [*range(20, 120), *done.token_ids]
    scored = (await client.score("base", ids))[99:]
    expected = teacher_forced(reference, ids)[99:]
    assert max(abs(a - b) for a, b in zip(done.log_probs, scored, strict=True)) <= 1e-4
    assert max(abs(a - b) for a, b in zip(done.log_probs, expected, strict=True)) <= 1e-4


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.5}, {"top_p": 0.5}, {"top_k": 2}, {"min_p": 0.2}, {"repetition_penalty": 1.5}]
)
async def test_log_probs_are_raw_whatever_the_sampling(
    client: SamplerClient, reference: Any, fields: dict[str, Any]
) -> None:
    done = await client.complete(ask(**fields))
    expected = teacher_forced(reference, [*PROMPT, *done.token_ids])[len(PROMPT) - 1 :]
    assert done.log_probs == pytest.approx(expected, abs=5e-4)


async def test_temperature_zero_takes_the_most_likely_token(client: SamplerClient, reference: Any) -> None:
    import torch

    done = await client.complete(ask(temperature=0.0, max_tokens=6))
    ids = list(PROMPT)
    for token in done.token_ids:
        with torch.no_grad():
            assert int(reference(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)


async def test_top_k_one_is_greedy(client: SamplerClient) -> None:
    greedy = await client.complete(ask(temperature=0.0))
    assert (await client.complete(ask(top_k=1))).token_ids == greedy.token_ids


async def test_the_same_seed_gives_the_same_tokens_on_an_idle_engine(client: SamplerClient) -> None:
    first, again, other = [await client.complete(ask(seed=s, max_tokens=24)) for s in (5, 5, 6)]
    assert (first.token_ids, first.log_probs) == (again.token_ids, again.log_probs)
    assert first.token_ids != other.token_ids


async def test_a_stop_id_stays_in_the_tokens_and_leaves_the_text(client: SamplerClient) -> None:
    free = await client.complete(ask(temperature=0.0, max_tokens=12))
    stop = free.token_ids[3]
    at = free.token_ids.index(stop)
    done = await client.complete(ask(temperature=0.0, max_tokens=12, stop_token_ids=(stop,)))
    assert done.token_ids == free.token_ids[: at + 1]
    assert len(done.log_probs) == at + 1
    assert (done.finish_reason, done.stop_reason) == ("stop", stop)


async def test_a_stop_string_stays_in_the_tokens_and_leaves_the_text(client: SamplerClient) -> None:
    free = await client.complete(ask(temperature=0.0, seed=1, max_tokens=40, prompt_ids=[66, 67, 68]))
    stop = next(c for c in free.text[2:] if c.isascii() and c.isprintable())
    done = await client.complete(ask(temperature=0.0, seed=1, max_tokens=40, prompt_ids=[66, 67, 68], stop=(stop,)))
    assert (done.finish_reason, done.stop_reason) == ("stop", stop)
    assert stop not in done.text
    assert free.text.startswith(done.text + stop)
    assert done.token_ids == free.token_ids[: len(done.token_ids)]
    assert len(done.log_probs) == len(done.token_ids)


async def test_n_gives_independent_choices(http: HttpClient, target: Target) -> None:
    _, body = await post(http, target, n=2, max_tokens=24, seed=3)
    assert [c["index"] for c in body["choices"]] == [0, 1]
    assert body["choices"][0]["token_ids"] != body["choices"][1]["token_ids"]


async def test_prompt_log_probs_are_keyed_by_token_with_a_null_in_front(http: HttpClient, target: Target) -> None:
    _, body = await post(http, target, prompt_logprobs=0, max_tokens=1)
    rows = body["choices"][0]["prompt_logprobs"]
    assert rows[0] is None
    assert len(rows) == len(PROMPT)
    assert all(math.isfinite(row[str(token)]["logprob"]) for row, token in zip(rows[1:], PROMPT[1:], strict=True))


async def test_a_score_is_the_same_each_time_and_right(client: SamplerClient, reference: Any) -> None:
    ids = [(7 * i) % 250 for i in range(300)]  # longer than one scored chunk
    first, again = await client.score("base", ids), await client.score("base", ids)
    assert first == again
    assert first == pytest.approx(teacher_forced(reference, ids), abs=1e-4)


async def test_max_tokens_is_silently_cut_to_the_context(client: SamplerClient, target: Target) -> None:
    prompt = [20] * (target.max_length - 3)
    done = await client.complete(ask(prompt_ids=prompt, max_tokens=50, seed=11))
    assert len(done.token_ids) <= 3
    if len(done.token_ids) == 3:
        assert done.finish_reason in ("length", "stop")


async def test_a_prompt_that_is_too_long_names_input_tokens(client: SamplerClient, target: Target) -> None:
    with pytest.raises(SamplerRejected, match="maximum context length") as caught:
        await client.complete(ask(prompt_ids=[20] * (target.max_length + 1)))
    assert caught.value.param == "input_tokens"


async def test_a_prompt_that_fills_the_context_names_max_tokens(client: SamplerClient, target: Target) -> None:
    with pytest.raises(SamplerRejected) as caught:
        await client.complete(ask(prompt_ids=[20] * target.max_length))
    assert caught.value.param == "max_tokens"


async def test_an_unknown_model_is_not_found(client: SamplerClient) -> None:
    with pytest.raises(ModelNotServed, match="does not exist"):
        await client.complete(ask(model="never-loaded"))


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [10, 1_000_000]}, {"prompt": [-1]}, {"prompt": []}, {"max_tokens": "many"}, {"temperature": -1},
        {"top_p": 0}, {"n": 0}, {"logprobs": 21},
    ],
)  # fmt: skip
async def test_a_malformed_request_is_a_400_in_the_envelope(
    http: HttpClient, target: Target, fields: dict[str, Any]
) -> None:
    status, body = await post(http, target, **fields)
    assert status == 400
    assert body["error"].keys() >= {"message", "type", "param", "code"}
    assert body["error"]["code"] == 400


async def test_a_body_that_is_not_json_is_a_400(http: HttpClient, target: Target) -> None:
    response = await http.post(
        f"{target.url}/v1/completions", content=b"{", headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["message"]


async def test_unknown_fields_are_ignored(http: HttpClient, target: Target) -> None:
    status, _ = await post(http, target, cache_salt="x", priority=3, nonsense={"a": 1})
    assert status in (200, 400) if not target.builtin else status == 200


async def test_wrong_method_and_path_have_the_other_shape(http: HttpClient, target: Target) -> None:
    wrong_method = await http.get(f"{target.url}/v1/completions")
    wrong_path = await http.get(f"{target.url}/v1/nothing")
    assert (wrong_method.status_code, wrong_path.status_code) == (405, 404)
    assert "detail" in wrong_path.json()
