"""Server-sent events over an answer that comes in one piece, and the end of the work when its client has gone.

Does not cover: what the events hold (`answer`, `responses.answer`). The sampler protocol we use has no streaming: an
answer is sampled whole, so that a sampler lost half way is replaced before the client has read a word, and then sent in
order; until then a comment every few seconds keeps proxies and clients from hanging up.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

from app.core.errors import ServiceError

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)

KEEP_ALIVE_S = 10.0
KEEP_ALIVE = b": waiting for the sampler\n\n"


class ClientGone(ServiceError):
    """Nobody reads the answer any more; the status is for the access log alone."""

    status = 499
    default_code = "client_closed_request"


class Wire(Protocol[T_contra]):
    """How one kind of request is answered in events."""

    def head(self) -> Iterable[bytes]:
        """What is said before the answer is there."""
        ...

    def body(self, answer: T_contra) -> Iterable[bytes]: ...

    def failed(self, error: ServiceError) -> bytes:
        """The one event that ends a stream whose answer never came."""
        ...


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return ((f"event: {name}\n" if name else "") + f"data: {text}\n\n").encode()


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


async def events(work: asyncio.Task[T], wire: Wire[T], *, keep_alive_s: float = KEEP_ALIVE_S) -> AsyncIterator[bytes]:
    """The head, comments until `work` is done, then its body; a failure is an error event and the end.

    Closing the iterator, as the server does when the client leaves, cancels the work.
    """
    try:
        for chunk in wire.head():
            yield chunk
        while not work.done():
            await asyncio.wait({work}, timeout=keep_alive_s)
            if not work.done():
                yield KEEP_ALIVE
        try:
            result = await work
        except ServiceError as error:
            yield wire.failed(error)
            return
        for chunk in wire.body(result):
            yield chunk
    finally:
        work.cancel()
