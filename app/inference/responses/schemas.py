"""The wire of `/v1/responses`: what a request may hold and what an answer looks like (contract §12.2).

Does not cover: rules between fields (`request`) and the events of a stream (`answer`). Unknown fields are ignored;
a field that would change the answer and cannot be honoured is refused with the reason.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import BeforeValidator, Field, WithJsonSchema
from typing_extensions import TypedDict

from app.inference.schemas import (
    MAX_TOOLS,
    FunctionSpec,
    Hone,
    Lenient,
    SamplingFields,
    TokenLogprob,
    ToolType,
    Unicode,
    text_of_parts,
    text_or_parts,
)

MAX_METADATA = 16
PART_KINDS = ("input_text", "output_text", "text", "reasoning_text")


def _known_item(kind: Any) -> Any:
    if kind == "item_reference":
        raise ValueError("nothing is stored here that could be referred to; send the item itself")
    return kind


def _one_message(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def _choice(given: Any) -> Any:
    """The hosted API can force a call; without constrained decoding a forced call would be a promise we break."""
    if given not in (None, "auto", "none"):
        raise ValueError("only 'auto' and 'none' are supported; a call cannot be forced here")
    return given


Text = Annotated[str | None, text_of_parts(*PART_KINDS), text_or_parts(*PART_KINDS)]
ItemKind = Annotated[
    Literal["message", "function_call", "function_call_output", "reasoning"], BeforeValidator(_known_item)
]
ToolChoice = Annotated[Literal["auto", "none"] | None, BeforeValidator(_choice)]


class InputItem(Lenient):
    """One item, as sent or as it came from an earlier answer's `output`."""

    type: ItemKind = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = Field(None, description="Of a message.")
    content: Text = Field(None, description="Of a message; of a `reasoning` item, which goes to the next turn.")
    call_id: str | None = None
    name: str | None = Field(None, description="Of a `function_call`.")
    arguments: str | None = Field(None, description="Of a `function_call`: JSON text.")
    output: Text = Field(None, description="Of a `function_call_output`.")


Input = Annotated[
    list[InputItem],
    BeforeValidator(_one_message),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"$ref": "#/components/schemas/InputItem"}}]}
    ),
]


class FunctionTool(FunctionSpec, ToolType):
    strict: bool | None = Field(None, description="Accepted; arguments are not constrained while they are written.")


class TextFormat(Lenient):
    type: str = Field(description="Only `text`.")


class TextOptions(Lenient):
    format: TextFormat | None = None


class Reasoning(Lenient):
    """Echoed. A model reasons as its chat template has it."""

    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(SamplingFields):
    """`top_k`, `min_p`, `repetition_penalty` and `seed` are extras: the SDK sends them through `extra_body`."""

    model: Unicode = Field(description="A base model, a fine-tuned model `ft:…`, or a checkpoint.")
    input: Input
    instructions: str | None = None
    tools: list[FunctionTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = Field(None, description="`message.output_text.logprobs` adds log-probs.")
    top_logprobs: int | None = Field(None, ge=0, le=20)
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=MAX_METADATA
    )
    store: bool | None = Field(None, description="Accepted; nothing is stored.")
    stream: bool | None = None
    background: bool | None = None
    truncation: str | None = None
    previous_response_id: str | None = Field(None, description="Refused: send the earlier items.")
    conversation: Any = Field(None, description="Refused: send the earlier items.")
    prompt: Any = Field(None, description="Refused: send the text.")


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class MessageItem(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: str
    content: list[OutputText]


class CallItem(TypedDict):
    id: str
    type: Literal["function_call"]
    status: str
    call_id: str
    name: str
    arguments: str


class ReasoningText(TypedDict):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(TypedDict):
    id: str
    type: Literal["reasoning"]
    status: str
    summary: list[Any]
    content: list[ReasoningText]


OutputItem = MessageItem | CallItem | ReasoningItem


class InputDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(TypedDict):
    reasoning_tokens: int  # not counted apart: 0


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Incomplete(TypedDict):
    reason: Literal["max_output_tokens"]


class ResponseObject(TypedDict):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete"]
    error: None
    incomplete_details: Incomplete | None
    model: str
    instructions: str | None
    output: list[OutputItem]
    tools: list[dict[str, Any]]
    tool_choice: Literal["auto", "none"]
    parallel_tool_calls: bool
    temperature: float
    top_p: float
    max_output_tokens: int | None
    reasoning: dict[str, str | None]
    text: dict[str, Any]
    truncation: Literal["disabled"]
    metadata: dict[str, str]
    previous_response_id: None
    background: bool
    store: bool
    usage: ResponseUsage | None
    hone: NotRequired[Hone]
