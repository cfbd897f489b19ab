"""The storm's sampler: the subset of vLLM's protocol that we use, over the storm's policy, without torch.

Does not cover: what a right engine must do (`tests/contract/sampler`). It forgets its adapters when it dies, as all do.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from tokenizers import Tokenizer

from tests.chaos.tiny_policy import TENSOR_FILE, log_probs, read_adapter

RIGHT, WRONG = "yes", "no"
TURN_S = (0.03, 0.2)


class Engine:
    def __init__(self, model: Path, name: str, context: int) -> None:
        self.name, self.context = name, context
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        end = int(tokenizer.token_to_id("<|im_end|>") or 0)
        self.answers = {text: [*tokenizer.encode(text).ids, end] for text in (RIGHT, WRONG)}
        self.adapters: dict[str, tuple[str, NDArray[np.float64]]] = {}
        self.running = self.generated = 0

    def app(self) -> Starlette:
        routes = {
            "/health": self.health,
            "/version": self.version,
            "/metrics": self.metrics,
            "/v1/models": self.models,
            "/v1/completions": self.complete,
            "/v1/load_lora_adapter": self.load,
            "/v1/unload_lora_adapter": self.unload,
        }
        posts = ("/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
        return Starlette(
            routes=[Route(path, do, methods=["POST" if path in posts else "GET"]) for path, do in routes.items()]
        )

    async def health(self, _: Request) -> Response:
        return Response()

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": "storm", "dtype": "float32"})

    async def metrics(self, _: Request) -> Response:
        figures = {
            "num_requests_running": self.running,
            "num_requests_waiting": 0,
            "generation_tokens_total": self.generated,
        }
        return PlainTextResponse("".join(f"vllm:{name} {value}\n" for name, value in figures.items()))

    async def models(self, _: Request) -> Response:
        found: list[dict[str, Any]] = [{"id": self.name, "root": None, "parent": None, "max_model_len": self.context}]
        found += [{"id": name, "root": path, "parent": self.name} for name, (path, _) in self.adapters.items()]
        return JSONResponse({"data": found})

    async def load(self, request: Request) -> Response:
        body = await request.json()
        name, path = body["lora_name"], body["lora_path"]
        if name in self.adapters:
            return refusal(400, f"{name} has already been loaded")
        try:
            data = (Path(path) / TENSOR_FILE).read_bytes()
        except FileNotFoundError:
            return refusal(404, f"no adapter at {path}")
        self.adapters[name] = (path, read_adapter(data))
        return PlainTextResponse("ok")

    async def unload(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        if self.adapters.pop(name, None) is None:
            return refusal(404, f"{name} is not loaded")
        return PlainTextResponse("ok")

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        model, prompt = body["model"], body["prompt"]
        if model != self.name and model not in self.adapters:
            return refusal(404, f"the model {model} does not exist")
        adapter = None if model == self.name else self.adapters[model][1]
        self.running += 1
        try:
            if "prompt_logprobs" in body:
                choice = self.score(prompt, adapter)
            else:
                await asyncio.sleep(random.uniform(*TURN_S))
                choice = self.sample(body, adapter)
            self.generated += len(choice["token_ids"])
        finally:
            self.running -= 1
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(choice["token_ids"])}
        return JSONResponse({"model": model, "choices": [{"index": 0, **choice}], "usage": usage})

    def score(self, prompt: list[int], adapter: NDArray[np.float64] | None) -> dict[str, Any]:
        scores = zip(prompt[1:], log_probs(prompt, adapter), strict=True)
        rows = [None, *({str(token): {"logprob": value}} for token, value in scores)]
        last = self.answers[RIGHT][-1]
        return self.choice([last], prompt, adapter, "length") | {"prompt_logprobs": rows}

    def sample(self, body: dict[str, Any], adapter: NDArray[np.float64] | None) -> dict[str, Any]:
        """Right or wrong by a coin, so that groups have something to learn from; greedy is right."""
        text = RIGHT if body["temperature"] == 0.0 or random.random() < 0.5 else WRONG
        ids = self.answers[text][: body["max_tokens"]]
        reason = "stop" if len(ids) == len(self.answers[text]) else "length"
        return self.choice(ids, body["prompt"], adapter, reason) | {"text": text}

    def choice(
        self, ids: list[int], prompt: list[int], adapter: NDArray[np.float64] | None, reason: str
    ) -> dict[str, Any]:
        values = log_probs([prompt[-1], *ids], adapter)
        return {
            "text": "",
            "token_ids": ids,
            "logprobs": {"token_logprobs": values},
            "finish_reason": reason,
            "stop_reason": None,
        }


def refusal(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "storm", "param": None, "code": status}}, status)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    arguments = parser.parse_args()
    engine = Engine(arguments.model, arguments.name, arguments.context)
    uvicorn.run(engine.app(), host="127.0.0.1", port=arguments.port, log_level="warning", lifespan="off", ws="none")


if __name__ == "__main__":
    main()
