"""A user's endpoint for tests: a real HTTP server on the loopback that answers from a script and remembers.

Does not cover: TLS.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

Message = MutableMapping[str, Any]


@dataclass
class Reply:
    """One scripted answer. `body` is sent as JSON unless it is bytes; `delay_s` is the silence before it."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    trickle_s: float = 0.0  # between single bytes of the body

    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    headers: dict[str, str]
    names: list[str]  # of the headers as they came, so that a doubled one is seen
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class UserEndpoint:
    """Plays `script` in order and repeats its last reply."""

    def __init__(self) -> None:
        self.script: list[Reply] = [Reply(body={})]
        self.seen: list[Seen] = []
        self.at: list[float] = []
        self.url = ""
        self.port = 0

    def plays(self, *replies: Reply) -> None:
        self.script = list(replies)

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        reply = self.script[min(len(self.seen), len(self.script) - 1)]
        self.seen.append(
            Seen(scope["method"], scope["path"], headers, [name.decode() for name, _ in scope["headers"]], body)
        )
        self.at.append(asyncio.get_running_loop().time())
        await asyncio.sleep(reply.delay_s)
        named = [(name.encode(), value.encode()) for name, value in reply.headers.items()]
        await send({"type": "http.response.start", "status": reply.status, "headers": named})
        content = reply.content()
        pieces = [content[i : i + 1] for i in range(len(content))] if reply.trickle_s else [content]
        for piece in pieces:
            await asyncio.sleep(reply.trickle_s)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def serving() -> AsyncIterator[UserEndpoint]:
    endpoint = UserEndpoint()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        endpoint.port = listener.getsockname()[1]
        endpoint.url = f"http://127.0.0.1:{endpoint.port}/call"
        config = uvicorn.Config(endpoint, log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=1)
        config.load()
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        # Without its main loop, which ticks ten times a second and would take over the signals of pytest.
        await server.startup(sockets=[listener])
        try:
            yield endpoint
        finally:
            server.force_exit = True
            await server.shutdown(sockets=[listener])
