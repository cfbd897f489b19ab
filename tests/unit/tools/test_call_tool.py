"""One tool call over real HTTP: what is sent, and what each answer means."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import replace
from typing import Any

import pytest

from app.net.clients import EgressPolicy, HttpClient, guarded_client
from app.net.endpoint import Mask
from app.net.exchange import MAX_BODY_BYTES, Retry
from app.tools.http import (
    CallContext,
    EndpointUnreachable,
    FunctionCall,
    ToolEndpoint,
    ToolFailed,
    ToolOutcome,
    call_tool,
    dial,
)
from tests.unit.net.user_endpoint import Reply, UserEndpoint

CALL = FunctionCall(id="fc_1", call_id="call_1", name="lookup", arguments='{"item": "pear"}')
CONTEXT = CallContext(trace_id="trace_1", item={"price": 3, "näme": "pear"}, job_id="ftjob-1", step=7, split="train")
SECRET = "Bearer s3cr3t-value"


async def call(
    http: HttpClient, endpoint: UserEndpoint, *, context: CallContext = CONTEXT, **headers: str
) -> ToolOutcome:
    tool = ToolEndpoint("lookup", endpoint.url, headers or {"Authorization": SECRET})
    deadline = time.monotonic() + 10
    return await call_tool(http, tool, CALL, context, timeout_s=5, deadline=deadline, retry=Retry(base_s=0.01))


async def test_the_request_is_the_contract(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, {"output": "3"}))
    outcome = await call(http, endpoint)
    sent = endpoint.seen[0]
    assert sent.json == {
        "type": "function_call",
        "id": "fc_1",
        "call_id": "call_1",
        "name": "lookup",
        "arguments": '{"item": "pear"}',
        "trace_id": "trace_1",
        "item": {"price": 3, "näme": "pear"},
    }
    wanted = {
        "authorization": SECRET,
        "content-type": "application/json",
        "x-rollout-id": "trace_1",
        "x-job-id": "ftjob-1",
        "x-step": "7",
        "x-split": "train",
        "idempotency-key": "trace_1:call_1",
    }
    assert wanted.items() <= sent.headers.items()
    assert (outcome.output, outcome.status, outcome.attempts, outcome.is_error) == ("3", 200, 1, False)


async def test_our_headers_win_over_the_users_in_any_case(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, {"output": ""}))
    await call(http, endpoint, **{"x-rollout-id": "forged", "CONTENT-TYPE": "text/plain"})
    assert endpoint.seen[0].headers["x-rollout-id"] == "trace_1"
    assert endpoint.seen[0].headers["content-type"] == "application/json"
    assert len(set(endpoint.seen[0].names)) == len(endpoint.seen[0].names)


@pytest.mark.parametrize(
    ("body", "output"),
    [
        ({"output": "text"}, "text"),
        ({"output": ""}, ""),
        ({"result": {"output": "inner"}}, "inner"),
        ({"output": {"a": [1, "ü"]}}, '{"a": [1, "ü"]}'),
        ({"output": 3.5}, "3.5"),
        ({"output": None}, "null"),
    ],
)
async def test_output_is_text_for_the_model(http: HttpClient, endpoint: UserEndpoint, body: Any, output: str) -> None:
    endpoint.plays(Reply(200, body))
    assert (await call(http, endpoint)).output == output


@pytest.mark.parametrize(
    ("reply", "output"),
    [
        (Reply(404, {"error": "no such item"}), '{"error": "no such item"}'),
        (Reply(422, {"output": "bad item"}), "bad item"),
        (Reply(400, b"plain words"), "plain words"),
        (Reply(403, b""), "Error 403"),
    ],
)
async def test_a_4xx_is_shown_to_the_model(http: HttpClient, endpoint: UserEndpoint, reply: Reply, output: str) -> None:
    endpoint.plays(reply)
    outcome = await call(http, endpoint)
    assert (outcome.output, outcome.status, outcome.is_error) == (output, reply.status, True)
    assert len(endpoint.seen) == 1


async def test_retries_carry_the_same_call_id(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(500), Reply(429), Reply(200, {"output": "ok"}))
    outcome = await call(http, endpoint)
    assert outcome.attempts == 3
    assert {seen.json["call_id"] for seen in endpoint.seen} == {"call_1"}
    assert {seen.headers["idempotency-key"] for seen in endpoint.seen} == {"trace_1:call_1"}


@pytest.mark.parametrize("status", [500, 503, 429])
async def test_a_lasting_fault_fails_the_rollout_and_names_it(
    http: HttpClient, endpoint: UserEndpoint, status: int
) -> None:
    endpoint.plays(Reply(status, f"I saw {SECRET}".encode()))
    with pytest.raises(ToolFailed) as failed:
        await call(http, endpoint)
    error = failed.value
    assert (error.tool, error.url, error.attempts) == ("lookup", endpoint.url, 4)
    assert error.last_error == f"answered {status}: I saw ***"
    assert "s3cr3t" not in f"{error} {error!r} {error.args}"


@pytest.mark.parametrize(
    "reply",
    [
        Reply(400, {"headers": {"authorization": SECRET}}),
        Reply(401, f"no such key: {SECRET}".encode()),
        Reply(200, {"output": {"echo": [SECRET, "grader-s3cr3t"]}}),
        Reply(200, {"result": {"output": SECRET}}),
    ],
)
async def test_a_tool_that_echoes_a_secret_of_the_job_shows_none(
    http: HttpClient, endpoint: UserEndpoint, reply: Reply
) -> None:
    endpoint.plays(reply)
    tool = ToolEndpoint("lookup", endpoint.url, {"Authorization": SECRET}, Mask.of({"X-Key": "grader-s3cr3t"}))
    outcome = await call_tool(http, tool, CALL, CONTEXT, timeout_s=5, deadline=None)
    assert "***" in outcome.output
    assert "s3cr3t" not in f"{outcome.output} {tool}"


@pytest.mark.parametrize("status", [200, 503])
async def test_a_fault_names_no_secret_of_another_endpoint(
    http: HttpClient, endpoint: UserEndpoint, status: int
) -> None:
    endpoint.plays(Reply(status, b"{'x-key': 'grader-s3cr3t'}"))
    tool = ToolEndpoint("lookup", f"{endpoint.url}?key=query-s3cr3t", {}, Mask.of({"X-Key": "grader-s3cr3t"}))
    with pytest.raises(ToolFailed) as failed:
        await call_tool(http, tool, CALL, CONTEXT, timeout_s=5, deadline=None, retry=Retry(base_s=0.01))
    assert "***" in str(failed.value)
    assert "s3cr3t" not in f"{failed.value} {failed.value.args}"


def test_a_failure_shows_no_query_whoever_raises_it() -> None:
    assert "s3cr3t" not in str(ToolFailed("lookup", "http://tools.example/x?key=s3cr3t", 0, "too busy"))


@pytest.mark.parametrize("body", [b"", b"<html>s3cr3t-value</html>", b"[1]", b'{"answer": 1}', b"[" * 100_000])
async def test_a_200_without_output_is_a_fault_of_the_tool(
    http: HttpClient, endpoint: UserEndpoint, body: bytes
) -> None:
    endpoint.plays(Reply(200, body))
    with pytest.raises(ToolFailed, match="'output'") as failed:
        await call(http, endpoint)
    assert "s3cr3t" not in str(failed.value)
    assert len(endpoint.seen) == 1


async def test_a_response_over_a_megabyte_is_a_413_for_the_model(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, {"output": "x" * MAX_BODY_BYTES}))
    outcome = await call(http, endpoint)
    assert (outcome.status, outcome.is_error) == (413, True)
    assert outcome.output == "Error 413: the response of lookup is larger than 1 MB"


async def test_a_request_over_a_megabyte_is_not_sent(http: HttpClient, endpoint: UserEndpoint) -> None:
    outcome = await call(http, endpoint, context=replace(CONTEXT, item={"big": "x" * MAX_BODY_BYTES}))
    assert (outcome.status, outcome.attempts, outcome.is_error) == (413, 0, True)
    assert "request" in outcome.output
    assert endpoint.seen == []


async def test_a_lone_surrogate_of_the_model_is_sent_as_valid_json(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, {"output": ""}))
    tool = ToolEndpoint("lookup", endpoint.url, {})
    await call_tool(http, tool, replace(CALL, arguments="\ud800"), CONTEXT, timeout_s=5, deadline=None)
    assert isinstance(json.loads(endpoint.seen[0].body)["arguments"], str)


@pytest.mark.parametrize("status", [200, 307, 401, 404, 405, 500])
async def test_any_status_counts_as_reachable(http: HttpClient, endpoint: UserEndpoint, status: int) -> None:
    endpoint.plays(Reply(status))
    await dial(http, endpoint.url)
    assert endpoint.seen[0].method == "HEAD"


async def test_a_dial_says_why_nobody_answered(http: HttpClient, endpoint: UserEndpoint) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(EndpointUnreachable, match=r"no HTTP answer within 0\.2 s"):
            await dial(http, f"http://127.0.0.1:{silent.getsockname()[1]}/x?token=s3cr3t", timeout_s=0.2)
        closed = f"http://127.0.0.1:{silent.getsockname()[1]}/"
    with pytest.raises(EndpointUnreachable, match="onnect"):
        await dial(http, closed)
    with pytest.raises(EndpointUnreachable, match=r"nowhere\.invalid"):
        await dial(http, "http://nowhere.invalid/")
    async with guarded_client(EgressPolicy(), timeout_s=5) as guarded:
        with pytest.raises(EndpointUnreachable, match="HONE_EGRESS_ALLOW"):
            await dial(guarded, endpoint.url)
    assert endpoint.seen == []
