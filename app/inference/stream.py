"""Server-sent events over an answer that comes in one piece, and the end of the work when its client has gone.

Does not cover: what the chunks hold (`answer`). The sampler protocol we use has no streaming, so the answer is sampled
whole and then sent in order; until then a comment every few seconds keeps proxies and clients from hanging up.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar

from app.core.errors import ServiceError

T = TypeVar("T")

KEEP_ALIVE_S = 10.0
KEEP_ALIVE = b": waiting for the sampler\n\n"
DONE = b"data: [DONE]\n\n"


class ClientGone(ServiceError):
    """Nobody reads the answer any more; the status is for the access log alone."""

    status = 499
    default_code = "client_closed_request"


def event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error_event(error: ServiceError) -> bytes:
    """The envelope as an event: the SDK raises APIError for it."""
    body = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return event({"error": body})


async def first_look(work: asyncio.Task[T], gone: Callable[[], Awaitable[object]], *, wait_s: float | None) -> bool:
    """Wait for `work` at most `wait_s` (None: to its end); True when it is done. Raises ClientGone.

    `gone` returns when the client has hung up. Whoever leaves here by an exception leaves no work behind.
    """
    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({work, watch}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        if watch.done() and not work.done():
            raise ClientGone("The client closed the connection.")
        return work.done()
    except BaseException:
        work.cancel()  # closes the connection to the sampler, which frees the engine
        raise
    finally:
        watch.cancel()


async def events(
    work: asyncio.Task[T], chunks: Callable[[T], Iterable[Mapping[str, Any]]], *, keep_alive_s: float = KEEP_ALIVE_S
) -> AsyncIterator[bytes]:
    """Comments until `work` is done, then its chunks and `[DONE]`; a failure is an error event and the end.

    Closing the iterator, as the server does when the client leaves, cancels the work.
    """
    try:
        while not work.done():
            await asyncio.wait({work}, timeout=keep_alive_s)
            if not work.done():
                yield KEEP_ALIVE
        try:
            result = await work
        except ServiceError as error:
            yield error_event(error)
            return
        for chunk in chunks(result):
            yield event(chunk)
        yield DONE
    finally:
        work.cancel()
