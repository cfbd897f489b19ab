"""The user's side of a benchmark as a process of its own: slow tools, a grader that answers at once, counters.

Run as `python -m benchmarks.harness.tool_server [--mean 1 --p99 10]`; the first line it prints is its address. Plain
ASGI: the server must not be what is measured. Does not cover: authentication, failures.

The n-th call since the last `/reset` waits the n-th latency of a seeded sequence, whoever makes it: both sides of a
benchmark meet the same latencies. A body holds `arguments`, a JSON text, as the service sends it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

from benchmarks.harness.agent_task import answer_of, score_sample
from benchmarks.harness.latency import Lognormal

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class ToolServer:
    """ASGI application. Paths: /tools/<name>, /grade, /reset, /seen."""

    def __init__(self, latency: Lognormal) -> None:
        self._latency = latency
        self._reset(0)

    def _reset(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.seen: dict[str, int | float] = {
            "calls": 0,
            "grades": 0,
            "waited_s": 0.0,
            "in_flight": 0,
            "peak_in_flight": 0,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = await _body(receive)
        path: str = scope["path"]
        if scope["method"] == "HEAD":
            await _answer(send, {})
        elif path.startswith("/tools/"):
            await _answer(send, await self._tool(path.removeprefix("/tools/"), json.loads(body)))
        elif path == "/grade":
            self.seen["grades"] += 1
            request = json.loads(body)
            await _answer(send, {"score": score_sample(request["sample"], request["item"])})
        elif path == "/reset":
            asked = json.loads(body or b"{}")
            if "mean_s" in asked:
                self._latency = Lognormal.of(asked["mean_s"], asked["p99_s"])
            self._reset(int(asked.get("seed", 0)))
            await _answer(send, {})
        else:
            await _answer(send, self.seen)

    async def _tool(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        seen, wait_s = self.seen, self._latency.draw(self._random)
        seen["calls"] += 1
        seen["waited_s"] += wait_s
        seen["in_flight"] += 1
        seen["peak_in_flight"] = max(seen["peak_in_flight"], seen["in_flight"])
        try:
            await asyncio.sleep(wait_s)
        finally:
            seen["in_flight"] -= 1
        arguments = json.loads(request["arguments"])
        words = int((request.get("item") or {}).get("reply_words", 0))  # a long page around the answer
        output = answer_of(name, arguments) + " " + " ".join(str(seen["calls"] + at) for at in range(words))
        return {"type": "function_call_output", "output": output.strip()}


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _answer(send: Send, value: dict[str, Any]) -> None:
    data = json.dumps(value).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": data})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mean", type=float, default=1.0, help="seconds; 0 answers at once")
    parser.add_argument("--p99", type=float, default=10.0)
    options = parser.parse_args()
    app = ToolServer(Lognormal.of(options.mean, options.p99))
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        # asyncio leaves it off on inherited sockets: 40 ms per answer on a kept connection otherwise.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", backlog=4096)
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
