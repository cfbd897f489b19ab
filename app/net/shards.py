"""One connection per pool and many pools behind one transport, so that a burst of requests stays cheap.

Does not cover: which addresses may be dialled; each shard is a transport that already knows (`clients`).

httpcore looks at every connection of its pool, for every connection of its pool, whenever a request begins or ends:
with 512 connections in one pool a request costs 18 ms of CPU. So no pool here has more than one, no request ever waits
inside a pool, and idle pools are found by the server that they are connected to.

A request that is cancelled between httpcore's making a connection and its first use leaves it there for ever, neither
open nor closed nor idle, and whoever gets that pool next waits until the time is up. So a pool is given up with the
request that did not end in it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import httpx

log = logging.getLogger(__name__)

Origin = tuple[str, str, int | None]
NOWHERE: Origin = ("", "", None)


class ShardedTransport(httpx.AsyncBaseTransport):
    """At most `max_connections` requests at once, each over a connection of its own; the others wait in line."""

    def __init__(self, make_shard: Callable[[httpx.Limits], httpx.AsyncBaseTransport], max_connections: int) -> None:
        self._make_shard = make_shard
        # uvicorn drops an idle connection after 5 s, which is also httpx's default: ours must be the first to let go,
        # or a request now and then meets a closed door.
        self._limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=3.0)
        self._most = max_connections
        self._shards = {make_shard(self._limits)}  # one at once: what cannot be made fails here, not in a request
        self._idle = {NOWHERE: list(self._shards)}  # no empty lists; of one server's, the one used last comes last
        self._slots = asyncio.Semaphore(max_connections)
        self._closing: set[asyncio.Task[None]] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send through a shard. Waiting for a turn is bounded by the request's pool timeout (PoolTimeout)."""
        if self._slots.locked():
            try:
                async with asyncio.timeout(request.extensions.get("timeout", {}).get("pool")):
                    await self._slots.acquire()
            except TimeoutError:
                raise httpx.PoolTimeout("too many requests at once", request=request) from None
        else:
            await self._slots.acquire()  # at once
        origin = (request.url.scheme, request.url.host, request.url.port)
        shard = self._take(origin)
        try:
            response = await shard.handle_async_request(request)
        except BaseException:
            self._give_up(shard)
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Held(
            response.stream, lambda whole: self._release(origin, shard) if whole else self._give_up(shard)
        )
        return response

    def _take(self, origin: Origin) -> httpx.AsyncBaseTransport:
        """A shard that is likely to be connected to `origin`, else a new one, else one that another server had."""
        if origin in self._idle:
            return self._pop(origin, -1)
        if len(self._shards) < self._most:
            shard = self._make_shard(self._limits)
            self._shards.add(shard)
            return shard
        return self._pop(next(iter(self._idle)), 0)  # it closes its old connection itself

    def _pop(self, origin: Origin, at: int) -> httpx.AsyncBaseTransport:
        shards = self._idle[origin]
        shard = shards.pop(at)
        if not shards:
            del self._idle[origin]
        return shard

    def _release(self, origin: Origin, shard: httpx.AsyncBaseTransport) -> None:
        self._idle.setdefault(origin, []).append(shard)
        self._slots.release()

    def _give_up(self, shard: httpx.AsyncBaseTransport) -> None:
        self._shards.remove(shard)
        closing = asyncio.ensure_future(shard.aclose())  # by itself: the request may be one that is being cancelled
        self._closing.add(closing)
        closing.add_done_callback(self._closed)
        self._slots.release()

    def _closed(self, closing: asyncio.Task[None]) -> None:
        self._closing.discard(closing)
        if not closing.cancelled() and (error := closing.exception()) is not None:
            log.debug("a connection that was given up: %s", error)

    async def aclose(self) -> None:
        """Close every shard."""
        for shard in self._shards:
            await shard.aclose()
        await asyncio.gather(*self._closing, return_exceptions=True)


class _Held(httpx.AsyncByteStream):
    """A body whose end gives the turn back, once, and says whether it could be closed in order."""

    def __init__(self, inner: httpx.AsyncByteStream, release: Callable[[bool], None]) -> None:
        self._inner = inner
        self._release: Callable[[bool], None] | None = release

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._inner:
            yield chunk

    async def aclose(self) -> None:
        closed = False
        try:
            await self._inner.aclose()
            closed = True
        finally:
            release, self._release = self._release, None
            if release is not None:
                release(closed)
