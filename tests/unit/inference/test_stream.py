"""Events in order, comments while waiting, and nothing left running when the client has gone.

Does not cover: real sockets (`tests/api/test_chat`, `tests/api/test_responses`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from app.core.errors import ServiceError, Unavailable
from app.inference.stream import KEEP_ALIVE, ClientGone, event, events, first_look


class Words:
    """Says hello first, then the answer."""

    def head(self) -> Iterator[bytes]:
        yield event({"text": "hello"}, name="greeting")

    def body(self, found: str) -> Iterator[bytes]:
        yield event({"text": found})

    def failed(self, error: ServiceError) -> bytes:
        return event({"failed": error.code})


async def never() -> None:
    await asyncio.Event().wait()


async def test_comments_come_until_the_answer_is_there() -> None:
    work = asyncio.create_task(asyncio.sleep(0.05, "answer"))
    sent = [chunk async for chunk in events(work, Words(), keep_alive_s=0.02)]
    assert sent[:2] == [b'event: greeting\ndata: {"text":"hello"}\n\n', KEEP_ALIVE]
    assert sent[-1] == b'data: {"text":"answer"}\n\n'


async def test_a_late_failure_is_one_event_and_the_end() -> None:
    async def fail() -> str:
        raise Unavailable("no sampler", code="no_sampler")

    sent = [chunk async for chunk in events(asyncio.create_task(fail()), Words())]
    assert sent[1:] == [b'data: {"failed":"no_sampler"}\n\n']


async def test_closing_the_stream_cancels_the_work() -> None:
    work = asyncio.create_task(never())
    stream = events(work, Words(), keep_alive_s=0.001)
    await anext(stream)
    await stream.aclose()
    with pytest.raises(asyncio.CancelledError):
        await work


async def test_a_client_that_hangs_up_cancels_the_work() -> None:
    work = asyncio.create_task(never())
    with pytest.raises(ClientGone):
        await first_look(work, lambda: asyncio.sleep(0.001), wait_s=None)
    with pytest.raises(asyncio.CancelledError):
        await work


async def test_a_cancelled_request_cancels_the_work() -> None:
    work = asyncio.create_task(never())
    looking = asyncio.create_task(first_look(work, never, wait_s=None))
    await asyncio.sleep(0)
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking
    with pytest.raises(asyncio.CancelledError):
        await work


async def test_an_answer_that_takes_long_is_left_to_the_stream() -> None:
    work = asyncio.create_task(never())
    assert await first_look(work, never, wait_s=0.001) is False
    work.cancel()
