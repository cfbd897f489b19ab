"""A response on the wire: one object, or the same as typed events in the order a client expects them.

Does not cover: how events travel (`app.inference.stream`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from app.core.errors import ServiceError
from app.core.ids import new_id
from app.inference.answer import hone
from app.inference.request import Ask
from app.inference.responses.schemas import CallItem, MessageItem, OutputItem, ResponseObject, ResponsesRequest
from app.inference.service import Answer
from app.inference.stream import event

Event = tuple[str, dict[str, Any]]  # its type, its fields


def started(request: ResponsesRequest, ask: Ask) -> ResponseObject:
    """What is known before a token is sampled."""
    reasoning = request.reasoning
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": ask.model,
        "instructions": request.instructions,
        "output": [],
        "tools": [{"description": None, "parameters": None, "strict": None, **t.sent} for t in request.tools or ()],
        "tool_choice": request.tool_choice or "auto",
        "parallel_tool_calls": ask.parallel,
        "temperature": ask.sampling.temperature,
        "top_p": ask.sampling.top_p,
        "max_output_tokens": ask.max_tokens,
        "reasoning": {
            "effort": reasoning.effort if reasoning else None,
            "summary": reasoning.summary if reasoning else None,
        },
        "text": {"format": {"type": "text"}},
        "truncation": "disabled",
        "metadata": request.metadata or {},
        "previous_response_id": None,
        "background": False,
        "store": False,
        "usage": None,
    }


def finished(begun: ResponseObject, answer: Answer) -> ResponseObject:
    """`begun` with the answer in it; `incomplete` when the model was cut off."""
    (choice,) = answer.choices
    cut = choice.finish_reason == "length"
    return {
        **begun,
        "status": "incomplete" if cut else "completed",
        "completed_at": None if cut else int(time.time()),
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": _items(answer),
        "usage": {
            "input_tokens": answer.prompt_tokens,
            "input_tokens_details": {"cached_tokens": answer.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": choice.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": answer.prompt_tokens + choice.completion_tokens,
        },
        "hone": hone(answer),
    }


def _items(answer: Answer) -> list[OutputItem]:
    """Reasoning, text, calls: the order in which a turn is written."""
    (choice,) = answer.choices
    status = "incomplete" if choice.finish_reason == "length" else "completed"
    items: list[OutputItem] = []
    if choice.reasoning is not None:
        items.append(
            {
                "id": new_id("rs_"),
                "type": "reasoning",
                "status": status,
                "summary": [],
                "content": [{"type": "reasoning_text", "text": choice.reasoning}],
            }
        )
    if choice.content is not None:
        logprobs = choice.logprobs["content"] if choice.logprobs else []
        message: MessageItem = {
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [
                {
                    "type": "output_text",
                    "text": choice.content,
                    "annotations": [],
                    "logprobs": [{**entry, "bytes": entry["bytes"] or []} for entry in logprobs],
                }
            ],
        }
        items.append(message)
    for made in choice.tool_calls:
        call: CallItem = {
            "id": new_id("fc_"),
            "type": "function_call",
            "status": "completed",
            "call_id": made["id"],
            "name": made["function"]["name"],
            "arguments": made["function"]["arguments"],
        }
        items.append(call)
    return items


class ResponseEvents:
    """The events of one stream; `sequence_number` runs through all of them."""

    def __init__(self, begun: ResponseObject) -> None:
        self._begun = begun
        self._number = 0

    def head(self) -> Iterator[bytes]:
        """Before the answer is there."""
        for kind in ("response.created", "response.in_progress"):
            yield self._bytes(kind, response=self._begun)

    def body(self, answer: Answer) -> Iterator[bytes]:
        whole = finished(self._begun, answer)
        for index, item in enumerate(whole["output"]):
            for kind, fields in _item_events(item):
                yield self._bytes(kind, output_index=index, **fields)
        yield self._bytes(f"response.{whole['status']}", response=whole)

    def failed(self, error: ServiceError) -> bytes:
        """Flat, as the Responses API has it, and with the envelope, for which the SDK raises APIError."""
        flat = {"code": error.code, "message": error.message, "param": error.param}
        return self._bytes("error", **flat, error={**flat, "type": error.type})

    def _bytes(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **fields}, name=kind)


def _item_events(item: OutputItem) -> Iterator[Event]:
    here = {"item_id": item["id"]}
    if item["type"] == "function_call":
        yield "response.output_item.added", {"item": {**item, "status": "in_progress", "arguments": ""}}
        yield "response.function_call_arguments.delta", {**here, "delta": item["arguments"]}
        yield (
            "response.function_call_arguments.done",
            {**here, "name": item["name"], "arguments": item["arguments"]},
        )
    else:
        yield "response.output_item.added", {"item": {**item, "status": "in_progress", "content": []}}
        for index, part in enumerate(item["content"]):
            whole: dict[str, Any] = {**part}
            at = {**here, "content_index": index}
            logprobs = {"logprobs": whole["logprobs"]} if "logprobs" in whole else {}
            empty = {**whole, "text": "", **({"logprobs": []} if logprobs else {})}
            yield "response.content_part.added", {**at, "part": empty}
            yield f"response.{part['type']}.delta", {**at, "delta": part["text"], **logprobs}
            yield f"response.{part['type']}.done", {**at, "text": part["text"], **logprobs}
            yield "response.content_part.done", {**at, "part": part}
    yield "response.output_item.done", {"item": item}
