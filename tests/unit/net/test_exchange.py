"""Retries, pauses, deadlines, caps and secrets of one exchange with a user's endpoint."""

from __future__ import annotations

import asyncio
import gzip
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from app.net.clients import EgressPolicy, HttpClient, guarded_client
from app.net.exchange import MAX_BODY_BYTES, Answer, Attempted, Retry, Unanswered, _retry_after, post_json
from deploy.local.ports import free_port
from tests.unit.net.user_endpoint import Reply, UserEndpoint

FAST = Retry(base_s=0.01, cap_s=0.02)
SECRET = "Bearer s3cr3t-t0ken-value"


async def post(http: HttpClient, url: str, *, timeout_s: float = 5.0, budget_s: float | None = 10.0) -> Answer:
    deadline = None if budget_s is None else time.monotonic() + budget_s
    headers = {"Authorization": SECRET}
    return await post_json(http, url, b"{}", headers, timeout_s=timeout_s, deadline=deadline, retry=FAST)


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408, 425])
async def test_a_passing_fault_is_tried_again(http: HttpClient, endpoint: UserEndpoint, status: int) -> None:
    endpoint.plays(Reply(status), Reply(status), Reply(200, {"ok": 1}))
    answer = await post(http, endpoint.url)
    assert (answer.status, answer.attempts, answer.body) == (200, 3, b'{"ok": 1}')


async def test_after_three_retries_it_is_over(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(500, b"out of  memory\n at line 3"))
    with pytest.raises(Unanswered) as error:
        await post(http, endpoint.url)
    assert error.value.attempts == len(endpoint.seen) == 4
    assert error.value.last_error == "answered 500: out of memory at line 3"


@pytest.mark.parametrize("status", [400, 401, 404, 409, 422])
async def test_a_4xx_is_an_answer(http: HttpClient, endpoint: UserEndpoint, status: int) -> None:
    endpoint.plays(Reply(status, {"why": "no"}))
    assert (await post(http, endpoint.url)).status == status
    assert len(endpoint.seen) == 1


async def test_a_redirect_fails_at_once_with_that_reason(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(307, headers={"Location": "http://169.254.169.254/"}))
    with pytest.raises(Unanswered, match="redirect 307"):
        await post(http, endpoint.url)
    assert len(endpoint.seen) == 1


async def test_a_refused_address_fails_at_once(endpoint: UserEndpoint) -> None:
    async with guarded_client(EgressPolicy(), timeout_s=5) as http:
        with pytest.raises(Unanswered, match=f"adding 127.0.0.1:{endpoint.port} to HONE_EGRESS_ALLOW") as error:
            await post(http, endpoint.url)
    assert error.value.attempts == 1
    assert endpoint.seen == []


async def test_a_closed_port_is_tried_again_and_named(http: HttpClient) -> None:
    with pytest.raises(Unanswered, match="cannot connect") as error:
        await post(http, f"http://127.0.0.1:{free_port()}/x")
    assert error.value.attempts == 4


async def test_silence_is_bounded_by_the_timeout_of_an_attempt(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, {}, delay_s=5), Reply(200, {"ok": 1}))
    answer = await post(http, endpoint.url, timeout_s=1.0)
    assert answer.attempts == 2


async def test_a_trickling_answer_is_bounded_too(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, {"long": "x" * 100}, trickle_s=0.05))
    started = time.monotonic()
    with pytest.raises(Unanswered, match=r"no complete answer within 0\.2 s"):
        await post(http, endpoint.url, timeout_s=0.2)
    assert time.monotonic() - started < 4.5


async def test_retries_never_outlive_the_deadline(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, {}, delay_s=5))
    started = time.monotonic()
    with pytest.raises(Unanswered):
        await post(http, endpoint.url, timeout_s=0.3, budget_s=1.0)
    assert time.monotonic() - started < 4
    assert len(endpoint.seen) >= 2


async def test_an_attempt_ends_at_the_deadline(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, {}, delay_s=5))
    started = time.monotonic()
    with pytest.raises(Unanswered, match=r"no complete answer within (1|0\.\d+) s"):
        await post(http, endpoint.url, budget_s=1.0)
    assert time.monotonic() - started < 4


async def test_nothing_is_sent_after_the_deadline(http: HttpClient, endpoint: UserEndpoint) -> None:
    with pytest.raises(Unanswered, match="deadline passed before the first attempt") as error:
        await post(http, endpoint.url, budget_s=-1)
    assert (error.value.attempts, endpoint.seen) == (0, [])


async def test_whoever_watches_hears_how_each_attempt_ended(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(429, headers={"Retry-After": "0"}), Reply(200, {}, delay_s=5), Reply(404))
    heard: list[Attempted] = []
    await post_json(http, endpoint.url, b"{}", {}, timeout_s=1.0, deadline=None, retry=FAST, watch=heard.append)
    assert [(one.status, one.retry_after_s) for one in heard] == [(429, 0.0), (None, None), (404, None)]
    assert 0.99 <= heard[1].seconds < 5


async def test_no_cookie_is_kept_for_the_next_rollout(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, {}, headers={"Set-Cookie": "session=of-somebody; Path=/"}))
    for _ in range(2):
        await post_json(http, endpoint.url, b"{}", {"Cookie": "ours=1"}, timeout_s=5, deadline=None)
    assert [seen.headers["cookie"] for seen in endpoint.seen] == ["ours=1", "ours=1"]


async def test_retry_after_is_honoured(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(429, headers={"Retry-After": "1"}), Reply(200, {}))
    await post(http, endpoint.url)
    assert endpoint.at[1] - endpoint.at[0] >= 1.0


@pytest.mark.parametrize("budget_s", [10.0, None])
async def test_a_pause_longer_than_the_deadline_is_not_begun(
    http: HttpClient, endpoint: UserEndpoint, budget_s: float | None
) -> None:
    endpoint.plays(Reply(503, headers={"Retry-After": "90"}))
    started = time.monotonic()
    with pytest.raises(Unanswered, match="answered 503"):
        await post(http, endpoint.url, budget_s=budget_s)
    assert time.monotonic() - started < 8
    assert len(endpoint.seen) == 1


def test_retry_after_may_be_a_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 25 < (_retry_after(soon) or 0) <= 30
    assert _retry_after("Mon, 01 Jan 2001 00:00:00 GMT") == 0.0
    for unreadable in ("whenever", "Mon, 01 Jan 99999999999 00:00:00 GMT"):
        assert _retry_after(unreadable) is None


def test_the_pause_doubles_up_to_its_cap_and_jitters_down_to_half() -> None:
    longest, shortest = Retry(jitter=lambda: 1.0), Retry(jitter=lambda: 0.0)
    assert [longest.pause_s(attempt) for attempt in (1, 2, 3, 9)] == [0.25, 0.5, 1.0, 4.0]
    assert [shortest.pause_s(attempt) for attempt in (1, 2, 9)] == [0.125, 0.25, 2.0]


@pytest.mark.parametrize("announced", [True, False])
async def test_an_answer_over_the_cap_is_not_read(http: HttpClient, endpoint: UserEndpoint, announced: bool) -> None:
    size = MAX_BODY_BYTES + 1
    endpoint.plays(Reply(200, b"x" * size, {"Content-Length": str(size)} if announced else {}))
    assert (await post(http, endpoint.url)).body is None


async def test_an_answer_at_the_cap_is_read(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, b"x" * MAX_BODY_BYTES))
    assert len((await post(http, endpoint.url)).body or b"") == MAX_BODY_BYTES


async def test_a_compressed_answer_is_never_unpacked(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, gzip.compress(b"0" * 10_000_000), {"Content-Encoding": "gzip"}))
    with pytest.raises(Unanswered, match="gzip"):
        await post(http, endpoint.url)
    assert endpoint.seen[0].headers["accept-encoding"] == "identity"


async def test_no_header_value_and_no_query_reach_an_error(http: HttpClient, endpoint: UserEndpoint) -> None:
    page = f"{'.' * 280}you sent {SECRET} and s3cr3t-t0ken-value and k3y-in-query".encode()
    endpoint.plays(Reply(500, page))
    with pytest.raises(Unanswered) as error:
        await post(http, f"{endpoint.url}?api_key=k3y-in-query")
    text = f"{error.value!r} {error.value} {error.value.url} {error.value.last_error}"
    assert "s3cr" not in text
    assert "k3y" not in text
    assert error.value.__cause__ is None


async def test_a_header_that_cannot_be_written_is_not_quoted(http: HttpClient, endpoint: UserEndpoint) -> None:
    for value in ("s3cr3t\nX-Other: 1", "s3cr3t-é"):
        with pytest.raises(Unanswered, match="cannot be written") as error:
            await post_json(http, endpoint.url, b"{}", {"X-Key": value}, timeout_s=5, deadline=None, retry=FAST)
        assert "s3cr3t" not in str(error.value)
        assert error.value.attempts == 1


async def test_a_cancelled_exchange_leaves_the_client_usable(http: HttpClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, {}, delay_s=5), Reply(200, {"ok": 1}))
    task = asyncio.create_task(post(http, endpoint.url))
    while not endpoint.seen:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await post(http, endpoint.url)).attempts == 1
