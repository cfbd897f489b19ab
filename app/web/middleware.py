"""Around every request, in pure ASGI: request id, timing, security headers, body limits, the answer to a bug.

Does not cover: authentication (`app.web.deps.caller`) and the size of an uploaded file (`app.files`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.core.logging import bound
from app.web.errors import envelope

log = logging.getLogger(__name__)

API_VERSION = "2020-10-01"  # what OpenAI answers in openai-version
MAX_BODY_BYTES = 8 * 1024**2
STREAMED = re.compile(r"/v1/files/?")  # counts its own bytes while it stores them
LINGER_S = 5.0

_SECURITY = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}


class RequestContext:
    """Request id and headers on every answer; an unexpected exception becomes a 500 that names the request id.

    It is the outermost layer on purpose: Starlette's own 500 would be sent outside of any middleware, without headers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(16)}"
        scope.setdefault("state", {})["request_id"] = request_id
        began, started = time.monotonic(), False

        async def decorated(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-version"] = API_VERSION
                headers["openai-processing-ms"] = str(int((time.monotonic() - began) * 1000))
                headers.update(scope["state"].get("answer_headers", {}))
                for name, value in _SECURITY.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            with bound(request_id=request_id):
                await self.app(scope, receive, decorated)
        except ClientDisconnect:
            log.info("the client went away", extra={"ctx": {"request_id": request_id, "path": scope["path"]}})
        except Exception:
            log.exception("unhandled error", extra={"ctx": {"request_id": request_id, "path": scope["path"]}})
            if started:
                raise  # half an answer is out: only closing the connection tells the client
            message = f"The server had an error while processing your request. Request id: {request_id}."
            await _send_json(decorated, 500, envelope(message, "server_error", None, "internal_error"))


class BodyLimit:
    """413 for a body above the limit, by its declared length or by counting; never buffers.

    Whatever the reason, before an error goes out the rest of the body is read and dropped for a moment: closing a
    connection that still has unread bytes resets it, and the client would see a broken pipe instead of our answer.
    """

    def __init__(self, app: ASGIApp, limit: int = MAX_BODY_BYTES) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value for name, value in scope["headers"] if name in (b"content-length", b"transfer-encoding")}
        if not headers or headers == {b"content-length": b"0"}:  # beside it "chunked" would win, and count as nothing
            await self.app(scope, receive, send)
            return
        streamed = scope["method"] == "POST" and STREAMED.fullmatch(scope["path"]) is not None
        limit = None if streamed else self.limit
        seen, ended, exceeded = 0, False, False

        async def counted() -> Message:
            nonlocal seen, ended, exceeded
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                ended = not message.get("more_body", False)
                exceeded = limit is not None and seen > limit
            else:
                ended = True
            if exceeded:
                return {"type": "http.disconnect"}  # the inner application stops reading; its answer is not used
            return message

        async def drain() -> None:
            while not ended and (await receive()).get("more_body", False):
                pass

        async def guarded(message: Message) -> None:
            if exceeded:
                return
            if message["type"] == "http.response.start" and message["status"] >= 400 and not ended:
                await _linger(drain())
            await send(message)

        declared = headers.get(b"content-length", b"")
        if limit is not None and declared.isdigit() and int(declared) > limit:
            exceeded = True
        else:
            try:
                await self.app(scope, counted, guarded)
            except Exception:
                if not exceeded:
                    raise
        if exceeded:
            await _linger(drain())
            message = f"The request body is larger than {self.limit // 1024**2} MB."
            await _send_json(send, 413, envelope(message, "invalid_request_error", None, "request_too_large"))


async def _linger(draining: Any) -> None:
    try:
        await asyncio.wait_for(draining, LINGER_S)
    except TimeoutError:
        log.info("a client went on sending a body that was refused")


async def _send_json(send: Send, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
