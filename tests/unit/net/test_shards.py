"""A burst of requests: bounded, in line, and every turn given back."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from app.net.clients import EgressPolicy, HttpClient, guarded_client
from app.net.shards import ShardedTransport
from tests.unit.net.user_endpoint import Reply, UserEndpoint

LOOPBACK = EgressPolicy.parse("127.0.0.0/8:*")


def free_turns(http: HttpClient, most: int = 3) -> int:
    transport = http._transport
    assert isinstance(transport, ShardedTransport)
    idle = sum(len(shards) for shards in transport._idle.values())
    assert len(transport._shards) - idle == most - transport._slots._value
    return transport._slots._value


async def test_no_more_requests_than_allowed_are_under_way(endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, {}, delay_s=0.2))
    async with guarded_client(LOOPBACK, timeout_s=5, max_connections=3) as http:
        await asyncio.gather(*(http.get(endpoint.url) for _ in range(7)))
        starts = sorted(endpoint.at)
        assert starts[3] - starts[0] >= 0.19
        assert starts[6] - starts[3] >= 0.19
        assert free_turns(http) == 3


async def test_a_burst_over_as_many_connections_is_answered(endpoint: UserEndpoint) -> None:
    count = 100
    endpoint.plays(Reply(200, {}, delay_s=0.3))
    async with guarded_client(LOOPBACK, timeout_s=10, max_connections=count) as http:
        answers = await asyncio.gather(*(http.get(endpoint.url) for _ in range(count)))
    assert {answer.status_code for answer in answers} == {200}


async def test_every_way_out_gives_the_turn_back(endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, b"x" * 100_000))
    async with guarded_client(LOOPBACK, timeout_s=5, max_connections=3) as http:
        async with http.stream("GET", endpoint.url):
            assert free_turns(http) == 2  # left before the body was read
        assert free_turns(http) == 3
        with pytest.raises(httpx.ConnectError):
            await http.get("http://127.0.0.1:1/")
        endpoint.plays(Reply(200, {}, delay_s=5))
        with pytest.raises(httpx.ReadTimeout):
            await http.get(endpoint.url, timeout=0.1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await http.get(endpoint.url)
        assert free_turns(http) == 3


@pytest.mark.parametrize("warm", [False, True])
async def test_a_request_cancelled_at_any_moment_leaves_a_way_for_the_next(endpoint: UserEndpoint, warm: bool) -> None:
    """Pass by pass of the event loop; httpcore alone loses its only connection in one of them."""
    endpoint.plays(Reply(200, b"x" * 100_000, delay_s=0.001))
    for passes in range(60):
        async with guarded_client(LOOPBACK, timeout_s=5, max_connections=1) as http:
            if warm:
                await http.get(endpoint.url)
            doomed = asyncio.create_task(http.get(endpoint.url))
            for _ in range(passes):
                await asyncio.sleep(0)
            doomed.cancel()
            await asyncio.gather(doomed, return_exceptions=True)
            assert (await http.get(endpoint.url)).status_code == 200, passes
            assert free_turns(http, 1) == 1


async def test_waiting_for_a_turn_has_a_limit(endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(200, {}, delay_s=3))
    async with guarded_client(LOOPBACK, timeout_s=30, max_connections=1) as http:
        first = asyncio.create_task(http.get(endpoint.url))
        await asyncio.sleep(0.05)
        started = time.monotonic()
        with pytest.raises(httpx.PoolTimeout):
            await http.get(endpoint.url, timeout=0.1)
        assert time.monotonic() - started < 2.5
        assert (await first).status_code == 200


async def test_a_connection_is_used_again(endpoint: UserEndpoint) -> None:
    async with guarded_client(LOOPBACK, timeout_s=5) as http:
        peers = set()
        for _ in range(3):
            answer = await http.get(endpoint.url)
            peers.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
    assert len(peers) == 1


@pytest.mark.parametrize(("most", "kept"), [(2, True), (1, False)])
async def test_a_server_keeps_its_connection_while_there_is_room(endpoint: UserEndpoint, most: int, kept: bool) -> None:
    other = endpoint.url.replace("127.0.0.1", "localhost")

    async def peer(http: HttpClient, url: str) -> object:
        return (await http.get(url)).extensions["network_stream"].get_extra_info("client_addr")

    async with guarded_client(LOOPBACK, timeout_s=5, max_connections=most) as http:
        one, two = await peer(http, endpoint.url), await peer(http, other)
        assert ((await peer(http, endpoint.url), await peer(http, other)) == (one, two)) is kept
        assert free_turns(http, most) == most
