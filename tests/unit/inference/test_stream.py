"""Events in order, comments while waiting, and nothing left running when the client has gone.

Does not cover: real sockets (`tests/api/test_chat_stream`).
"""

from __future__ import annotations

import asyncio
import json

import pytest

from app.core.errors import Unavailable
from app.inference.stream import DONE, KEEP_ALIVE, ClientGone, events, first_look


async def never() -> None:
    await asyncio.Event().wait()


async def test_comments_come_until_the_answer_is_there() -> None:
    work = asyncio.create_task(asyncio.sleep(0.05, "answer"))
    sent = [chunk async for chunk in events(work, lambda found: [{"text": found}], keep_alive_s=0.02)]
    assert sent[0] == KEEP_ALIVE
    assert sent[-2:] == [b'data: {"text":"answer"}\n\n', DONE]


async def test_a_late_failure_is_an_error_event_and_no_done() -> None:
    async def fail() -> str:
        raise Unavailable("no sampler", code="no_sampler")

    sent = [chunk async for chunk in events(asyncio.create_task(fail()), lambda found: [])]
    assert len(sent) == 1
    assert json.loads(sent[0].removeprefix(b"data: "))["error"]["code"] == "no_sampler"


async def test_closing_the_stream_cancels_the_work() -> None:
    work = asyncio.create_task(never())
    stream = events(work, lambda found: [], keep_alive_s=0.001)
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
