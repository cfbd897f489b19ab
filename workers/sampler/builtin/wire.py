"""The completion request and answer of the protocol, between JSON and `generation`.

Unknown fields are ignored, as vLLM does; known ones are checked, and what this engine cannot do (log-probs of other
tokens than the sampled one, streaming, text prompts) is a 400 rather than a silent difference.
Does not cover: routes (`server`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from workers.sampler.builtin.generation import Generation, Outcome, RequestRefused
from workers.sampler.builtin.text import Decoder, trim

DEFAULT_MAX_TOKENS = 16


class CompletionBody(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model: str
    prompt: Annotated[list[Annotated[int, Field(strict=True)]], Field(min_length=1)]
    max_tokens: int | None = Field(DEFAULT_MAX_TOKENS, ge=1)
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    seed: int | None = None
    n: int = Field(1, ge=1, le=128)
    stop_token_ids: list[int] | None = None
    stop: str | list[str] | None = None
    ignore_eos: StrictBool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    return_token_ids: bool = False
    prompt_logprobs: int | None = Field(None, ge=0)
    stream: bool = False
    request_id: str | None = None


@dataclass(frozen=True)
class Completion:
    body: CompletionBody
    generations: Sequence[Generation]  # n of them


def parse(raw: Any, *, vocabulary: int, max_length: int, text: bool) -> Completion:
    """Check a body and cut `max_tokens` to the room behind the prompt. Raises RequestRefused."""
    try:
        body = CompletionBody.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RequestRefused(400, f"{where}: {first['msg']}", param=where.split(".")[0] or None) from error
    if body.stream:
        raise RequestRefused(400, "this engine does not stream", param="stream")
    if body.logprobs or body.prompt_logprobs:
        raise RequestRefused(400, "this engine gives the log-prob of the token itself only: send 0", param="logprobs")
    bad = next((i for i in body.prompt if not 0 <= i < vocabulary), None)
    if bad is not None:
        raise RequestRefused(400, f"Token id {bad} is out of vocabulary", param="prompt")
    size = len(body.prompt)
    if size > max_length:
        raise RequestRefused(
            400,
            f"This model's maximum context length is {max_length} tokens. However, your prompt contains {size}.",
            param="input_tokens",
        )
    if size == max_length:
        raise RequestRefused(400, "max_tokens must be at least 1, got 0.", param="max_tokens")
    stop = tuple(s for s in ([body.stop] if isinstance(body.stop, str) else body.stop or []) if s)
    if stop and not text:
        raise RequestRefused(400, "the model has no tokenizer.json, stop strings cannot be found", param="stop")
    room = max_length - size
    base = Generation(
        prompt=tuple(body.prompt),
        max_tokens=min(room, room if body.max_tokens is None else body.max_tokens),
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        seed=body.seed,
        stop_token_ids=frozenset(body.stop_token_ids or ()),
        stop=stop,
        ignore_eos=body.ignore_eos,
        score_prompt=body.prompt_logprobs is not None,
    )
    if body.n == 1:
        return Completion(body, [base])
    seeds = [None if body.seed is None else f"{body.seed}/{i}" for i in range(body.n)]
    return Completion(body, [replace(base, seed=seed) for seed in seeds])


def render(completion: Completion, outcomes: Sequence[Outcome], decoder: Decoder, *, identity: str) -> dict[str, Any]:
    body = completion.body
    sampled = sum(len(o.token_ids) for o in outcomes)
    size = len(body.prompt)
    cached = min(o.cached_tokens for o in outcomes)
    return {
        "id": identity,
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
        "choices": [_choice(i, completion, o, decoder) for i, o in enumerate(outcomes)],
        "usage": {
            "prompt_tokens": size,
            "completion_tokens": sampled,
            "total_tokens": size + sampled,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
    }


def _choice(index: int, completion: Completion, outcome: Outcome, decoder: Decoder) -> dict[str, Any]:
    body = completion.body
    text = decoder.decode(outcome.token_ids, skip_special=True)
    if isinstance(outcome.stop_reason, str):
        text = trim(text, outcome.stop_reason)
    choice: dict[str, Any] = {
        "index": index,
        "text": text,
        "finish_reason": outcome.finish_reason,
        "stop_reason": outcome.stop_reason,
        "logprobs": None,
        "prompt_logprobs": None,
    }
    if body.return_token_ids:
        choice |= {"token_ids": outcome.token_ids, "prompt_token_ids": body.prompt}
    if body.logprobs is not None:
        choice["logprobs"] = {
            "token_logprobs": outcome.log_probs,
            "tokens": [decoder.piece(t) for t in outcome.token_ids],
        }
    if outcome.prompt_log_probs is not None:
        choice["prompt_logprobs"] = [None] + [
            {str(t): {"logprob": p, "rank": rank, "decoded_token": decoder.piece(t)}}
            for t, (p, rank) in zip(body.prompt[1:], outcome.prompt_log_probs, strict=True)
        ]
    return choice
