"""The client of the vLLM protocol: token ids in, token ids and their log-probabilities out.

Every sampling field is sent, so that no default of a server or of a model's generation_config decides anything, and an
answer is checked before it is believed. Cancelling the task closes the connection, which frees the engine.
Does not cover: which sampler to ask and retries (the callers), proof of the served weights (`workers.sampler`).
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from app.net.clients import CONNECT_TIMEOUT_S, HttpClient, TimeoutException, TransportError
from app.samplers.errors import AdapterRefused, ModelNotServed, SamplerMisbehaved, SamplerRejected, SamplerUnavailable

PROBE_TIMEOUT_S = 5.0
ADAPTER_TIMEOUT_S = 120.0  # a load merges the adapter into a copy of the weights in the built-in engine
SCORE_TIMEOUT_S = 120.0

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class CompletionRequest:
    model: str
    prompt_ids: Sequence[int]
    max_tokens: int
    timeout_s: float
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    request_id: str | None = None


@dataclass(frozen=True)
class Completion:
    model: str
    token_ids: tuple[int, ...]  # with the stop id or all tokens of the stop string
    log_probs: tuple[float, ...]  # raw, one for each id
    text: str  # without the stop string
    finish_reason: FinishReason
    stop_reason: int | str | None  # None for the end-of-sequence token
    prompt_tokens: int
    cached_tokens: int | None
    sampler: str | None = None  # which one answered, where the caller knows several


@dataclass(frozen=True)
class ServedModel:
    id: str
    root: str | None
    parent: str | None
    max_model_len: int | None


class SamplerClient:
    """One for each sampler address, over `app.net.clients.operator_client`."""

    def __init__(self, http: HttpClient, base_url: str) -> None:
        self._http = http
        self.base_url = base_url.rstrip("/")

    async def health(self) -> bool:
        """True when the server answers and its engine is alive. Never raises for a server that is away."""
        return await self._probe() == 200

    async def engine_is_dead(self) -> bool:
        """True when the server itself says so (503); one that is silent may only be busy."""
        status = await self._probe()
        return status is not None and status >= 500

    async def _probe(self) -> int | None:
        try:
            response = await self._http.get(f"{self.base_url}/health", timeout=PROBE_TIMEOUT_S)
        except (TransportError, TimeoutException):
            return None
        return int(response.status_code)

    async def models(self) -> list[ServedModel]:
        """The base model and every adapter that is loaded; `root` and `parent` are the server's claims, not proof."""
        data = _field(await self._call("GET", "/v1/models", None, PROBE_TIMEOUT_S), "data", list, self.base_url)
        return [
            ServedModel(str(m["id"]), m.get("root"), m.get("parent"), m.get("max_model_len"))
            for m in data
            if isinstance(m, dict) and "id" in m
        ]

    async def version(self) -> dict[str, Any]:
        """What the server says about itself; the built-in engine tells dtype and speed, vLLM its version."""
        return await self._call("GET", "/version", None, PROBE_TIMEOUT_S)

    async def metrics(self) -> str:
        """The Prometheus text of the server; `app.samplers.metrics` reads it."""
        return (await self._send("GET", "/metrics", None, PROBE_TIMEOUT_S)).decode("utf-8", "replace")

    async def complete(self, request: CompletionRequest) -> Completion:
        """Sample one completion. Raises the errors of `app.samplers.errors`; a deadline is SamplerUnavailable."""
        body: dict[str, Any] = _fields(request.model, request.prompt_ids, request.max_tokens) | {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "min_p": request.min_p,
            "repetition_penalty": request.repetition_penalty,
            "stop_token_ids": list(request.stop_token_ids),
            "stop": list(request.stop),
        }
        if request.seed is not None:
            body["seed"] = request.seed
        if request.request_id is not None:
            body["request_id"] = request.request_id
        answer = await self._call("POST", "/v1/completions", body, request.timeout_s)
        choice = self._choice(answer, request.model, body["prompt"])
        ids, log_probs = self._sampled(choice)
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length", "abort"):
            raise self._misbehaved(f"finish_reason is {reason!r}")
        if not ids and reason != "abort":
            raise self._misbehaved("no token was sampled")
        usage = _field(answer, "usage", dict, self.base_url)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return Completion(
            model=request.model,
            token_ids=ids,
            log_probs=log_probs,
            text=str(choice.get("text") or ""),
            finish_reason=reason,
            stop_reason=choice.get("stop_reason"),
            prompt_tokens=len(request.prompt_ids),
            cached_tokens=cached if isinstance(cached, int) else None,
        )

    async def score(self, model: str, ids: Sequence[int], *, timeout_s: float = SCORE_TIMEOUT_S) -> list[float]:
        """Teacher-forced log-probs of `ids[1:]` under `model`: len(ids) - 1 values. Bypasses the prefix cache."""
        body = _fields(model, ids, 1) | {"prompt_logprobs": 0}
        answer = await self._call("POST", "/v1/completions", body, timeout_s)
        choice = self._choice(answer, model, body["prompt"])
        rows = choice.get("prompt_logprobs")
        if not isinstance(rows, list) or len(rows) != len(ids):
            raise self._misbehaved(f"prompt_logprobs does not have {len(ids)} entries")
        values = []
        for position, (token, row) in enumerate(zip(ids[1:], rows[1:], strict=True), start=1):
            try:
                values.append(_number(row[str(token)]["logprob"]))
            except (KeyError, TypeError, ValueError) as error:
                raise self._misbehaved(f"prompt_logprobs[{position}] has no value for token {token}") from error
        return values

    async def load_adapter(self, name: str, path: str) -> None:
        """Give the adapter in `path` (as the server sees it) a name that was never used before.

        A name that exists is SamplerRejected, a path that does not is ModelNotServed; files that the server finds
        broken are AdapterRefused: a 500 as vLLM answers it, from a server that is still well.
        """
        body = {"lora_name": name, "lora_path": path}
        try:
            await self._send("POST", "/v1/load_lora_adapter", body, ADAPTER_TIMEOUT_S)
        except SamplerUnavailable as error:
            if error.status == 500 and await self.health():
                raise AdapterRefused(error.reason, url=self.base_url, status=500) from error
            raise

    async def unload_adapter(self, name: str) -> None:
        """Take the name away; requests in flight finish on its weights. An unknown name is ModelNotServed."""
        await self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name}, ADAPTER_TIMEOUT_S)

    async def _call(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> dict[str, Any]:
        raw = await self._send(method, path, body, timeout_s)
        try:
            answer = json.loads(raw)
        except ValueError as error:
            raise self._misbehaved("the answer is not JSON") from error
        if not isinstance(answer, dict):
            raise self._misbehaved("the answer is not a JSON object")
        return answer

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                limits = (min(timeout_s, CONNECT_TIMEOUT_S), timeout_s, timeout_s, timeout_s)
                response = await self._http.request(method, self.base_url + path, json=body, timeout=limits)
        except (TransportError, TimeoutException, TimeoutError) as error:
            reason = str(error) or type(error).__name__
            raise SamplerUnavailable(f"{method} {path}: {reason}", url=self.base_url) from error
        if response.status_code != 200:
            self._raise_for(response.status_code, response.content, f"{method} {path}")
        return bytes(response.content)

    def _raise_for(self, status: int, content: bytes, what: str) -> NoReturn:
        message, param = _error(content)
        text = f"{what} answered {status}: {message}"
        if status == 404:
            raise ModelNotServed(text, url=self.base_url)
        if 400 <= status < 500 and status not in (408, 429):
            # A non-finite log-prob is vLLM's way to say that the weights are broken: no fault of the request.
            if "not JSON compliant" in message:
                raise SamplerMisbehaved(text, url=self.base_url)
            raise SamplerRejected(text, url=self.base_url, param=param)
        raise SamplerUnavailable(text, url=self.base_url, status=status)

    def _choice(self, answer: Mapping[str, Any], model: str, prompt: list[int]) -> dict[str, Any]:
        if answer.get("model") != model:
            raise self._misbehaved(f"asked for the model {model!r}, answered by {answer.get('model')!r}")
        choices = _field(answer, "choices", list, self.base_url)
        if len(choices) != 1 or not isinstance(choices[0], dict):
            raise self._misbehaved(f"{len(choices)} choices instead of one")
        seen = choices[0].get("prompt_token_ids")
        if seen is not None and seen != prompt:
            raise self._misbehaved("prompt_token_ids are not the ids that were sent")
        return choices[0]

    def _sampled(self, choice: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[float, ...]]:
        ids = choice.get("token_ids")
        log_probs = (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(ids, list) or not isinstance(log_probs, list) or len(ids) != len(log_probs):
            raise self._misbehaved("token_ids and token_logprobs do not match")
        if not all(type(i) is int for i in ids):
            raise self._misbehaved("token_ids holds something else than integers")
        try:
            return tuple(ids), tuple(_number(p) for p in log_probs)
        except ValueError as error:
            raise self._misbehaved("token_logprobs holds something else than finite numbers") from error

    def _misbehaved(self, message: str) -> SamplerMisbehaved:
        return SamplerMisbehaved(message, url=self.base_url)


def _fields(model: str, ids: Sequence[int], max_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(ids),
        "max_tokens": max_tokens,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "n": 1,
        "logprobs": 0,
        "return_token_ids": True,
        "stream": False,
    }


def _field(answer: Mapping[str, Any], key: str, kind: type[Any], url: str) -> Any:
    value = answer.get(key)
    if not isinstance(value, kind):
        raise SamplerMisbehaved(f"the answer has no {key}", url=url)
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(value)
    return float(value)


def _error(content: bytes) -> tuple[str, str | None]:
    """Message and param of an error body, in vLLM's envelope or as it is."""
    try:
        body = json.loads(content)
    except ValueError:
        return content[:300].decode("utf-8", "replace"), None
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return str(body)[:300], None
    return str(error.get("message"))[:1000], error.get("param")
