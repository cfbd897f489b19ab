"""HTTP of the built-in sampler: the routes of vLLM that Hone uses, over the engine's thread.

Does not cover: authentication. The load route reads any path the process can read, so keep the port private.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import signal
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from workers.sampler.builtin import wire
from workers.sampler.builtin.engine import Engine, Limits, Ticket
from workers.sampler.builtin.generation import AdapterRefused, EngineFault, Outcome, RequestRefused
from workers.sampler.builtin.model import LoadedModel, ModelRefused, gemm_gflops
from workers.sampler.builtin.text import Decoder, NoTokenizer, load_decoder

log = logging.getLogger(__name__)
LOAD_TIMEOUT_S = 110.0  # a little less than the client waits


def serve(args: argparse.Namespace) -> int:
    """Load, listen, and return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        speed = {name: gemm_gflops(getattr(torch, name)) for name in ("bfloat16", "float32")}
        print("gemm_gflops", json.dumps({k: round(v, 1) for k, v in speed.items()}), flush=True)  # noqa: T201
        name = args.dtype if args.dtype != "auto" else _faster(speed)
        try:
            model = LoadedModel(args.model, getattr(torch, name), args.max_model_len)
        except (ModelRefused, OSError, ValueError) as error:
            log.error("%s cannot be served: %s", args.model, error)
            return 1
    tokens = int(args.kv_gib * 2**30 / 2 / model.shape.bytes_per_token)
    limits = Limits(args.max_loras, args.max_lora_rank, cache_tokens=tokens, running_tokens=tokens)
    decoder = load_decoder(args.model)
    engine = Engine(model, decoder, args.served_model_name, limits)
    about = {"dtype": name, "gemm_gflops": speed, "threads": args.threads}
    config = uvicorn.Config(
        build_app(engine, decoder, about),
        host=args.host,
        port=args.port,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)

    def stop(*_: object) -> None:
        server.should_exit = True
        engine.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)

    def listen() -> None:
        try:
            server.run()
        except SystemExit:  # uvicorn's way to say that the port is taken
            log.error("cannot listen on %s:%d", args.host, args.port)
        engine.stop()

    # The engine keeps this thread, in which the model was loaded (see Engine.run); HTTP gets one of its own.
    http = threading.Thread(target=listen, name="http", daemon=True)
    http.start()
    engine.run()
    if engine.healthy:
        http.join(timeout=1.0)
        return 0 if server.should_exit else 1
    http.join()  # dead: answer 503 until somebody stops the process
    return 1


def _faster(speed: Mapping[str, float]) -> str:
    """bf16 unless fp32 is clearly faster: a busy moment at a restart must not change the precision of a running job."""
    return "float32" if speed["float32"] > 1.3 * speed["bfloat16"] else "bfloat16"


def build_app(engine: Engine, decoder: Decoder, about: dict[str, Any]) -> Starlette:
    routes = Routes(engine, decoder, about)
    return Starlette(
        routes=[
            Route("/health", routes.health),
            Route("/version", routes.version),
            Route("/metrics", routes.metrics),
            Route("/v1/models", routes.models),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/load_lora_adapter", routes.load_adapter, methods=["POST"]),
            Route("/v1/unload_lora_adapter", routes.unload_adapter, methods=["POST"]),
        ],
        exception_handlers={
            RequestRefused: _refused,
            HTTPException: lambda _, e: JSONResponse({"detail": e.detail}, e.status_code),
        },
    )


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestRefused)
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse(error.body(), error.status, headers)


class Routes:
    def __init__(self, engine: Engine, decoder: Decoder, about: dict[str, Any]) -> None:
        self._engine, self._decoder, self._about = engine, decoder, about

    async def health(self, _: Request) -> Response:
        return Response(status_code=200 if self._engine.healthy else 503)

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": "hone-builtin", **self._about})

    async def metrics(self, _: Request) -> Response:
        e, c = self._engine, self._engine.counters
        gauges = {
            "vllm:num_requests_running": e.running,
            "vllm:num_requests_waiting": e.waiting,
            "vllm:kv_cache_usage_perc": f"{e.kv_usage:.4f}",
        }
        counters = {
            "vllm:num_preemptions_total": 0,  # a sequence that was let in stays in: its room is reserved
            "vllm:prompt_tokens_total": c.prompt,
            "vllm:generation_tokens_total": c.generated,
            "vllm:prefix_cache_queries_total": c.prompt,
            "vllm:prefix_cache_hits_total": c.cached,
            "hone:steps_total": c.steps,
        }
        lines = [f"# TYPE {name} gauge\n{name} {value}" for name, value in gauges.items()]
        lines += [f"# TYPE {name} counter\n{name} {value}" for name, value in counters.items()]
        lines.append("# TYPE hone:gemm_gflops gauge")
        lines += [f'hone:gemm_gflops{{dtype="{k}"}} {v:.1f}' for k, v in self._about["gemm_gflops"].items()]
        return PlainTextResponse("\n".join(lines) + "\n")

    async def models(self, _: Request) -> Response:
        e = self._engine
        base = {
            "id": e.base_name,
            "object": "model",
            "root": str(e.model.path),
            "parent": None,
            "max_model_len": e.model.max_length,
        }
        tuned = [
            {"id": v.name, "object": "model", "root": v.root, "parent": e.base_name, "max_model_len": None}
            for v in e.adapters()
        ]
        return JSONResponse({"object": "list", "data": [base, *tuned]})

    async def completions(self, request: Request) -> Response:
        raw = await _json(request)
        model = self._engine.model
        completion = wire.parse(
            raw,
            vocabulary=model.vocabulary,
            max_length=model.max_length,
            text=not isinstance(self._decoder, NoTokenizer),
        )
        version = self._engine.resolve(completion.body.model)
        loop = asyncio.get_running_loop()
        waits: list[asyncio.Future[Outcome]] = []
        tickets: list[Ticket] = []
        gone = asyncio.create_task(_disconnected(request))
        try:
            for generation in completion.generations:
                future: asyncio.Future[Outcome] = loop.create_future()
                waits.append(future)
                tickets.append(self._engine.submit(version, generation, _deliver(loop, future)))
            everything = asyncio.ensure_future(asyncio.gather(*waits))
            await asyncio.wait((everything, gone), return_when=asyncio.FIRST_COMPLETED)
            if not everything.done():
                everything.cancel()
                return Response(status_code=499)
            outcomes = everything.result()
        except EngineFault as fault:
            raise RequestRefused(500, str(fault), type="InternalServerError") from fault
        finally:
            gone.cancel()
            for ticket, future in zip(tickets, waits, strict=False):
                if not future.done() or future.cancelled():
                    self._engine.cancel(ticket)
        identity = f"cmpl-{completion.body.request_id or request.headers.get('x-request-id') or uuid.uuid4().hex}"
        return JSONResponse(wire.render(completion, outcomes, self._decoder, identity=identity))

    async def load_adapter(self, request: Request) -> Response:
        body = await _json(request)
        name, path = _text(body, "lora_name"), _text(body, "lora_path")
        try:
            await run_in_threadpool(self._engine.load_adapter, name, Path(path), timeout_s=LOAD_TIMEOUT_S)
        except AdapterRefused as error:
            log.warning("adapter %s at %s refused: %s", name, path, error)
            raise RequestRefused(500, f"{name}: {error}", type="InternalServerError", param="lora_path") from error
        except EngineFault as error:
            raise RequestRefused(500, str(error), type="InternalServerError") from error
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload_adapter(self, request: Request) -> Response:
        name = _text(await _json(request), "lora_name")
        self._engine.unload_adapter(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _deliver(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Outcome]) -> Any:
    def settle(result: Outcome | EngineFault) -> None:
        if future.done():
            return
        if isinstance(result, EngineFault):
            future.set_exception(result)
        else:
            future.set_result(result)

    def finish(result: Outcome | EngineFault) -> None:
        with contextlib.suppress(RuntimeError):  # the loop closed while the engine was finishing its step
            loop.call_soon_threadsafe(settle, result)

    return finish


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _json(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except (ValueError, ClientDisconnect) as error:
        raise RequestRefused(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise RequestRefused(400, "the body must be a JSON object")
    return body


def _text(body: dict[str, Any], key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str) or not value:
        raise RequestRefused(400, f"{key} must be a non-empty string", param=key)
    return value
