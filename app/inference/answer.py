"""Answers on the wire: one completion, or the same as chunks in the order a client expects them.

Does not cover: how chunks travel (`stream`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from app.core.errors import ServiceError
from app.core.ids import new_id
from app.inference.request import Ask
from app.inference.schemas import (
    ChatChunk,
    ChatCompletion,
    ChoiceLogprobs,
    ChoiceOut,
    ChunkChoice,
    Delta,
    Hone,
    MessageOut,
    ToolCallOut,
    Usage,
)
from app.inference.service import Answer
from app.inference.stream import event
from app.inference.turns import Choice

DONE = b"data: [DONE]\n\n"


def completion(ask: Ask, answer: Answer) -> ChatCompletion:
    return {
        "id": new_id("chatcmpl-"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": ask.model,
        "choices": [_choice(index, choice) for index, choice in enumerate(answer.choices)],
        "usage": _usage(answer),
        "system_fingerprint": None,
        "hone": hone(answer),
    }


def chunks(ask: Ask, answer: Answer) -> Iterator[ChatChunk]:
    """Per choice: role, text, calls, finish; then the usage if it was asked for, in a chunk without choices."""
    head: ChatChunk = {
        "id": new_id("chatcmpl-"),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": ask.model,
        "choices": [],
        "system_fingerprint": None,
    }
    if ask.include_usage:
        head["usage"] = None
    first = True
    for index, choice in enumerate(answer.choices):
        for delta in _deltas(index, choice):
            chunk: ChatChunk = {**head, "choices": [delta]}
            if first:
                chunk["hone"] = hone(answer)
                first = False
            yield chunk
    if ask.include_usage:
        yield {**head, "usage": _usage(answer)}


class ChatEvents:
    """A stream of chunks; nothing goes out before the answer is there."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def head(self) -> Iterator[bytes]:
        return iter(())

    def body(self, answer: Answer) -> Iterator[bytes]:
        for chunk in chunks(self._ask, answer):
            yield event(chunk)
        yield DONE

    def failed(self, error: ServiceError) -> bytes:
        """The envelope as an event: the SDK raises APIError for it."""
        body = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
        return event({"error": body})


def _choice(index: int, choice: Choice) -> ChoiceOut:
    message: MessageOut = {"role": "assistant", "content": choice.content, "refusal": None}
    if choice.reasoning is not None:
        message["reasoning_content"] = choice.reasoning
    if choice.tool_calls:
        message["tool_calls"] = list(choice.tool_calls)
    return {"index": index, "message": message, "logprobs": choice.logprobs, "finish_reason": choice.finish_reason}


def _deltas(index: int, choice: Choice) -> Iterator[ChunkChoice]:
    deltas: list[Delta] = [{"role": "assistant", "content": "" if choice.content is not None else None}]
    if choice.reasoning is not None:
        deltas.append({"reasoning_content": choice.reasoning})
    if choice.content:
        deltas.append({"content": choice.content})
    for number, call in enumerate(choice.tool_calls):
        numbered: ToolCallOut = {**call, "index": number}
        deltas.append({"tool_calls": [numbered]})
    logprobs: ChoiceLogprobs | None = choice.logprobs
    for delta in deltas:
        yield {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
    yield {"index": index, "delta": {}, "logprobs": logprobs, "finish_reason": choice.finish_reason}


def _usage(answer: Answer) -> Usage:
    written = sum(choice.completion_tokens for choice in answer.choices)
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": answer.prompt_tokens + written,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens, "audio_tokens": 0},
    }


def hone(answer: Answer) -> Hone:
    return {
        "policy": answer.policy,
        "sampler": answer.sampler,
        "invalid_calls": [
            {"choice": index, "error": error} for index, choice in enumerate(answer.choices) for error in choice.errors
        ],
    }
