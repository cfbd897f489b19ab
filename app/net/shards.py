"""Many small connection pools behind one transport, so that a burst of requests stays cheap.

Does not cover: which addresses may be dialled; each shard is a transport that already knows (`clients`).

httpcore compares every waiting request with every connection each time anything happens in its pool. 500 requests at
once over one pool of 100 cost 4.4 s of CPU (client and server), over shards 0.9 s; a step starts with such a burst.
Here no request ever waits inside a pool, and no pool has more than SHARD_CONNECTIONS.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import httpx

SHARD_CONNECTIONS = 32


class ShardedTransport(httpx.AsyncBaseTransport):
    """At most `max_connections` requests at once, each in the first shard that has room; the others wait in line."""

    def __init__(self, make_shard: Callable[[httpx.Limits], httpx.AsyncBaseTransport], max_connections: int) -> None:
        # uvicorn drops an idle connection after 5 s, which is also httpx's default: ours must be the first to let go,
        # or a request now and then meets a closed door.
        limits = httpx.Limits(
            max_connections=SHARD_CONNECTIONS, max_keepalive_connections=SHARD_CONNECTIONS, keepalive_expiry=3.0
        )
        count = -(-max_connections // SHARD_CONNECTIONS)
        self._shards = [make_shard(limits) for _ in range(count)]
        self._busy = [0] * count
        self._slots = asyncio.Semaphore(max_connections)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send through a shard. Waiting for a turn is bounded by the request's pool timeout (PoolTimeout)."""
        timeouts = request.extensions.get("timeout", {})
        try:
            async with asyncio.timeout(timeouts.get("pool")):
                await self._slots.acquire()
        except TimeoutError:
            raise httpx.PoolTimeout("too many requests at once", request=request) from None
        index = next(index for index, busy in enumerate(self._busy) if busy < SHARD_CONNECTIONS)
        self._busy[index] += 1
        try:
            response = await self._shards[index].handle_async_request(request)
        except BaseException:
            self._release(index)
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Held(response.stream, lambda: self._release(index))
        return response

    def _release(self, index: int) -> None:
        self._busy[index] -= 1
        self._slots.release()

    async def aclose(self) -> None:
        """Close every shard."""
        for shard in self._shards:
            await shard.aclose()


class _Held(httpx.AsyncByteStream):
    """A body whose end gives the turn back, once."""

    def __init__(self, inner: httpx.AsyncByteStream, release: Callable[[], None]) -> None:
        self._inner = inner
        self._release: Callable[[], None] | None = release

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._inner:
            yield chunk

    async def aclose(self) -> None:
        try:
            await self._inner.aclose()
        finally:
            release, self._release = self._release, None
            if release is not None:
                release()
