"""Graders at work: string checks, the endpoint over real HTTP, and the formula over both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import pytest

from app.graders.base import Grade, GraderFailed, InvalidScore, Sample
from app.graders.build import build_grader
from app.graders.rate import RateLimit
from app.graders.sample import sample_of_messages
from app.graders.schemas import parse_grader
from app.net.clients import HttpClient
from app.net.endpoint import Mask
from app.net.exchange import MAX_BODY_BYTES, Retry
from app.tools.http import CallContext
from tests.unit.net.user_endpoint import Reply, UserEndpoint

ITEM = {"answer": "Pear", "price": 3}
CONTEXT = CallContext(trace_id="trace_1", item=ITEM, job_id="ftjob-1", step=7, split="valid")
SECRET = "Bearer s3cr3t-value"


async def grade(
    http: HttpClient, grader: Mapping[str, Any], sample: Sample | str, *, item: Mapping[str, Any] = ITEM
) -> Grade:
    built = build_grader(parse_grader(grader), http, timeout_s=5, retry=Retry(base_s=0.01))
    shown = said(sample) if isinstance(sample, str) else sample
    return await built.grade(shown, item, CONTEXT, deadline=time.monotonic() + 10)


def said(text: str) -> Sample:
    """A sample of one final message."""
    return sample_of_messages([{"role": "assistant", "content": text}], wants_json=True)


def check(operation: str, text: str = "{{sample.output_text}}", reference: str = "{{item.answer}}") -> dict[str, Any]:
    return {"type": "string_check", "input": text, "reference": reference, "operation": operation}


def asks(endpoint: UserEndpoint, **fields: Any) -> dict[str, Any]:
    return {"type": "endpoint", "name": "judge", "url": endpoint.url, "headers": {"Authorization": SECRET}, **fields}


@pytest.mark.parametrize(
    ("operation", "text", "score"),
    [
        ("eq", "Pear", 1),
        ("eq", "pear", 0),
        ("ne", "pear", 1),
        ("ne", "Pear", 0),
        ("like", "A Pear.", 1),
        ("like", "A pear.", 0),
        ("ilike", "A pEAR.", 1),
        ("ilike", "An apple.", 0),
    ],
)
async def test_string_check_compares(http: HttpClient, operation: str, text: str, score: int) -> None:
    assert (await grade(http, check(operation), text)).score == score


async def test_an_answer_that_lacks_the_field_scores_zero_but_a_row_that_lacks_it_has_no_score(
    http: HttpClient,
) -> None:
    wrong = await grade(http, check("eq", "{{sample.output_json.price}}", "3"), "not JSON")
    assert (wrong.score, wrong.extra) == (0.0, {"invalid_variable_error": True})
    assert (await grade(http, check("eq", "{{sample.output_json.price}}", "3"), '{"price": 3}')).score == 1.0
    with pytest.raises(InvalidScore, match=r"item\.colour"):
        await grade(http, check("eq", "x", "{{item.colour}}"), "x")


async def test_the_endpoint_sees_sample_item_and_trace(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, {"score": 0.5, "reason": "half", "scores": {"a": 1, "b": "x"}, "note": [1]}))
    sample = sample_of_messages([{"role": "assistant", "content": "3"}])
    got = await grade(http, asks(endpoint), sample)
    sent = endpoint.seen[0]
    assert sent.json == {"sample": sample.as_dict(), "item": ITEM, "trace_id": "trace_1"}
    wanted = {"authorization": SECRET, "x-rollout-id": "trace_1", "x-split": "valid", "x-job-id": "ftjob-1"}
    assert wanted.items() <= sent.headers.items()
    assert (got.score, got.reason, got.sub_scores, got.attempts) == (0.5, "half", {"a": 1.0}, 1)
    assert got.extra == {"reason": "half", "scores": {"a": 1, "b": "x"}, "note": [1]}


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        {"score": None},
        {"score": "1"},
        {"score": True},
        {"score": [1]},
        b'{"score": NaN}',
        b'{"score": Infinity}',
        b'{"score": 1e999}',
        b'{"score": 1' + b"0" * 400 + b"}",
        b"0.5 s3cr3t-value",
        b"",
        b"[" * 100_000,
    ],
)
async def test_no_finite_number_is_no_score(http: HttpClient, endpoint: UserEndpoint, body: Any) -> None:
    endpoint.plays(Reply(200, body))
    with pytest.raises(InvalidScore, match="judge") as error:
        await grade(http, asks(endpoint), "x")
    assert "s3cr3t" not in str(error.value)
    assert len(endpoint.seen) == 1


@pytest.mark.parametrize("score", [0, 1, -2.5, 1e-300])
async def test_any_finite_number_is_a_score(http: HttpClient, endpoint: UserEndpoint, score: float) -> None:
    endpoint.plays(Reply(200, {"score": score}))
    assert (await grade(http, asks(endpoint), "x")).score == score


@pytest.mark.parametrize(("status", "attempts"), [(500, 4), (429, 4), (401, 1), (307, 1)])
async def test_a_grader_that_fails_gives_no_score(
    http: HttpClient, endpoint: UserEndpoint, status: int, attempts: int
) -> None:
    endpoint.plays(Reply(status, f"saw {SECRET}".encode()))
    with pytest.raises(GraderFailed) as failed:
        await grade(http, asks(endpoint), "x")
    assert (failed.value.grader, failed.value.url) == ("judge", endpoint.url)
    assert failed.value.attempts == len(endpoint.seen) == attempts
    assert "s3cr3t" not in str(failed.value)


async def test_a_passing_fault_is_tried_again(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(503), Reply(200, {"score": 1}))
    assert (await grade(http, asks(endpoint), "x")).attempts == 2
    assert len({seen.headers["idempotency-key"] for seen in endpoint.seen}) == 1


async def test_both_directions_are_limited_to_a_megabyte(http: HttpClient, endpoint: UserEndpoint) -> None:
    with pytest.raises(GraderFailed, match="request of"):
        await grade(http, asks(endpoint), "x" * MAX_BODY_BYTES)
    assert endpoint.seen == []
    endpoint.plays(Reply(200, {"score": 1, "log": "x" * MAX_BODY_BYTES}))
    with pytest.raises(GraderFailed, match="answer is larger"):
        await grade(http, asks(endpoint), "x")


async def test_a_talkative_answer_is_not_kept_whole(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, {"score": 1, "log": "x" * 100_000}))
    assert list((await grade(http, asks(endpoint), "x")).extra) == ["omitted_bytes"]


async def test_a_grader_that_echoes_a_secret_of_the_job_leaves_none_in_the_grade(
    http: HttpClient, endpoint: UserEndpoint
) -> None:
    said = f"{SECRET} and tool-s3cr3t"
    endpoint.plays(Reply(200, {"score": 0.5, "reason": said, "scores": {said: 1}, "seen": {said: [said, 3]}}))
    spec = parse_grader(multi("judge", judge=asks(endpoint)))
    built = build_grader(spec, http, timeout_s=5, mask=Mask.of({"X-Key": "tool-s3cr3t"}))
    got = await built.grade(sample_of_messages([]), ITEM, CONTEXT)
    assert (got.score, got.reason) == (0.5, "judge: *** and ***")
    assert got.extra["judge"]["seen"] == {"*** and ***": ["*** and ***", 3]}
    assert "s3cr3t" not in f"{got}"


@pytest.mark.parametrize("status", [400, 503, 200])
async def test_a_grader_that_fails_names_no_secret(http: HttpClient, endpoint: UserEndpoint, status: int) -> None:
    endpoint.plays(Reply(status, {"error": f"{SECRET} and tool-s3cr3t"}))
    mask = Mask.of({"X-Key": "tool-s3cr3t"})
    built = build_grader(parse_grader(asks(endpoint)), http, timeout_s=5, retry=Retry(base_s=0.01), mask=mask)
    with pytest.raises((GraderFailed, InvalidScore), match=r"\*\*\* and \*\*\*") as failed:
        await built.grade(sample_of_messages([]), ITEM, CONTEXT)
    assert "s3cr3t" not in str(failed.value)


async def test_a_score_named_like_a_header_value_is_still_read(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, {"score": 0.25, "reason": "score"}))
    got = await grade(http, asks(endpoint, headers={"X-Kind": "score"}), "x")
    assert (got.score, got.reason) == (0.25, "***")


async def test_an_answer_nested_too_deep_to_be_kept_is_still_a_score(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, b'{"score": 1, "deep": ' + b"[" * 900 + b"]" * 900 + b"}"))
    assert (await grade(http, asks(endpoint), "x")).score == 1


async def test_a_rate_limit_spaces_the_requests(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, {"score": 1}))
    built = build_grader(parse_grader(asks(endpoint, rate_limit=20)), http, timeout_s=5)
    await asyncio.gather(*(built.grade(said("x"), ITEM, CONTEXT) for _ in range(5)))
    assert max(endpoint.at) - min(endpoint.at) >= 0.19


async def test_a_rate_limit_does_not_outlive_the_deadline(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, {"score": 1}))
    built = build_grader(parse_grader(asks(endpoint, rate_limit=0.01)), http, timeout_s=5)
    await built.grade(said("x"), ITEM, CONTEXT)
    with pytest.raises(GraderFailed, match="rate limit"):
        await built.grade(said("x"), ITEM, CONTEXT, deadline=time.monotonic() + 0.1)


async def test_whoever_cannot_wait_for_a_turn_takes_none_from_those_who_can() -> None:
    now = [0.0]
    limit = RateLimit(1000, clock=lambda: now[0])
    await limit.wait()
    for _ in range(100):
        with pytest.raises(TimeoutError):
            await limit.wait(0.0005)
    assert limit._next == pytest.approx(0.001)
    await limit.wait(0.0015)


async def test_a_rate_limit_saves_nothing_up_while_idle() -> None:
    now = [0.0]
    limit = RateLimit(50, clock=lambda: now[0])
    await limit.wait()
    now[0] = 100.0
    started = time.monotonic()
    await limit.wait()
    await limit.wait()
    assert time.monotonic() - started >= 0.019


def multi(formula: str, **parts: Any) -> dict[str, Any]:
    return {"type": "multi", "name": "all", "graders": parts, "calculate_output": formula}


async def test_multi_computes_over_its_parts(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(503), Reply(200, {"score": 0.5, "reason": "half"}))
    got = await grade(http, multi("max(right, 0) + judge ^ 2", right=check("eq"), judge=asks(endpoint)), "Pear")
    assert (got.score, got.sub_scores, got.attempts) == (1.25, {"right": 1.0, "judge": 0.5}, 2)
    assert got.reason == "judge: half"
    assert got.extra == {"judge": {"reason": "half"}}


async def test_the_parts_of_multi_run_at_the_same_time(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, {"score": 1}, delay_s=1))
    await grade(http, multi("a + b + c", a=asks(endpoint), b=asks(endpoint), c=asks(endpoint)), "x")
    assert max(endpoint.at) - min(endpoint.at) < 1  # none waited for another's answer


async def test_the_failure_of_a_part_is_the_failure(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(401))
    with pytest.raises(GraderFailed, match="'judge'"):
        await grade(http, multi("right", right=check("eq"), judge=asks(endpoint)), "Pear")


async def test_a_formula_without_a_value_is_no_score(http: HttpClient) -> None:
    with pytest.raises(InvalidScore, match="division by zero"):
        await grade(http, multi("1 / right", right=check("eq")), "apple")


def test_a_sample_shows_the_final_message_and_every_call() -> None:
    calls = [{"id": f"call_{n}", "type": "function", "function": {"name": "f", "arguments": "{}"}} for n in range(3)]
    messages = [
        {"role": "assistant", "content": "", "tool_calls": calls[:2]},
        {"role": "tool", "tool_call_id": "call_0", "content": "1"},
        {"role": "assistant", "content": None, "tool_calls": calls[2:]},
        {"role": "tool", "tool_call_id": "call_2", "content": "1"},
        {"role": "assistant", "content": '{"price": 3}'},
    ]
    sample = sample_of_messages(messages, finish_reason="length", wants_json=True)
    assert sample.output_text == '{"price": 3}'
    assert sample.output_json == {"price": 3}
    assert sample.output_tools == calls
    assert sample.choices == [{"index": 0, "message": messages[-1], "finish_reason": "length"}]
    assert sample_of_messages(messages).output_json is None
    assert sample_of_messages(messages[:-1]).output_text == ""
    assert sample_of_messages([]).output_text == ""
    assert said('{"a": NaN}').output_json is None
