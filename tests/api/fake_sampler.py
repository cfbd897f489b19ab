"""A sampler server that says what the test tells it, over real HTTP, in the subset of vLLM's protocol that we use.

Does not cover: the protocol's rules (`tests/contract/sampler`), nor tokens that mean anything: a token is a byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from app.db.engine import Database
from app.db.tables import Sampler

Say = Callable[[dict[str, Any]], str]
START_S = 10.0


@dataclass
class FakeSampler:
    """`say` gives the text for a request; `hold` delays every answer until the client has gone or the time is over."""

    base: str
    encode: Callable[[str], list[int]]
    end: int
    say: Say = lambda request: "84"
    hold_s: float = 0.0
    fail: Callable[[dict[str, Any]], Response | None] = lambda request: None
    url: str = ""
    adapters: dict[str, str] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    abandoned: threading.Event = field(default_factory=threading.Event)

    @property
    def loaded(self) -> dict[str, str]:
        """Adapter names, each with the last part of its path."""
        return {name: Path(path).name for name, path in self.adapters.items()}

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", _ok),
                Route("/v1/models", self._models),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/load_lora_adapter", self._load, methods=["POST"]),
                Route("/v1/unload_lora_adapter", self._unload, methods=["POST"]),
            ]
        )

    async def _models(self, _: Request) -> Response:
        served = {self.base: None, **self.adapters}
        return JSONResponse({"data": [{"id": name, "root": path, "parent": None} for name, path in served.items()]})

    async def _load(self, request: Request) -> Response:
        body = await request.json()
        self.adapters[body["lora_name"]] = body["lora_path"]
        return PlainTextResponse("ok")

    async def _unload(self, request: Request) -> Response:
        del self.adapters[(await request.json())["lora_name"]]
        return PlainTextResponse("ok")

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        if body["model"] not in {self.base, *self.adapters}:
            return error(404, "no such model", "model")
        if (failure := self.fail(body)) is not None:
            return failure
        if self.hold_s and await self._left(request):
            self.abandoned.set()
            return Response(status_code=499)
        written = self.encode(self.say(body))
        cut = len(written) >= body["max_tokens"]
        ids = written[: body["max_tokens"]] if cut else [*written, self.end]
        choice = {
            "index": 0,
            "text": "",
            "token_ids": ids,
            "logprobs": {"token_logprobs": [-0.5] * len(ids)},
            "finish_reason": "length" if cut else "stop",
            "stop_reason": None,
        }
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(ids)}
        return JSONResponse({"id": "cmpl-1", "model": body["model"], "choices": [choice], "usage": usage})

    async def _left(self, request: Request) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.hold_s):
                while (await request.receive())["type"] != "http.disconnect":
                    pass
                return True
        return False


def error(status: int, message: str, param: str | None) -> Response:
    return JSONResponse({"error": {"message": message, "type": "x", "param": param, "code": status}}, status)


async def _ok(_: Request) -> Response:
    return Response()


async def register(database: Database, sampler: FakeSampler, sampler_id: str) -> None:
    """As a keeper would; two adapters fit."""
    async with database.begin() as session:
        session.add(
            Sampler(
                id=sampler_id,
                project_id="proj_default",
                base_model=sampler.base,
                url=sampler.url,
                host="here",
                adapter_root="",
                max_loras=2,
                info={},
                started_at=time.time(),
                heartbeat=time.time() + 3600,
            )
        )


@contextlib.contextmanager
def serving(sampler: FakeSampler) -> Iterator[FakeSampler]:
    """Under uvicorn in a thread, on a free port of the loopback."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(sampler.app(), log_config=None, lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="fake-sampler")
        thread.start()
        deadline = time.monotonic() + START_S
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            assert server.started, "the fake sampler did not start"
            sampler.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            yield sampler
        finally:
            server.should_exit = True
            thread.join(START_S)
            assert not thread.is_alive(), "the fake sampler did not stop"
