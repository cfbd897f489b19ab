"""The wire of `/v1/chat/completions`: what a request may hold and what an answer looks like (contract §12.1).

Does not cover: rules between fields (`request`) and the events of a stream (`answer`). Unknown fields are ignored:
clients of the hosted API send more than an open model can use. A field that would change the answer is refused instead.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    WithJsonSchema,
    model_validator,
)
from typing_extensions import TypedDict

MAX_CHOICES = 8
MAX_STOPS = 4
MAX_TOOLS = 128
INT64 = 2**63


def text_of_parts(*kinds: str) -> BeforeValidator:
    """A list of parts of these kinds becomes its text; whatever else a part may be, these models cannot see it."""

    def join(content: Any) -> Any:
        if not isinstance(content, list):
            return content
        texts = []
        for index, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            text = part.get("text") if kind in kinds else part.get("refusal") if kind == "refusal" else None
            if not isinstance(text, str):
                known = " and ".join(repr(each) for each in kinds)
                raise ValueError(f"part {index} is not text; only parts of type {known} are supported")
            texts.append(text)
        return "".join(texts)

    return BeforeValidator(join)


def _unicode(text: str) -> str:
    """JSON escapes can spell half a character, which neither a database nor an answer can carry."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not Unicode text") from None
    return text


def _one_or_many(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def text_or_parts(*kinds: str) -> WithJsonSchema:
    """How `text_of_parts` reads in the contract."""
    part = {
        "type": "object",
        "properties": {
            "type": {"const": kinds[0]} if len(kinds) == 1 else {"enum": list(kinds)},
            "text": {"type": "string"},
        },
        "required": ["type", "text"],
    }
    return WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": part}, {"type": "null"}]})


_ONE_OR_MANY = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOPS},
        {"type": "null"},
    ]
}
Text = Annotated[str | None, text_of_parts("text"), text_or_parts("text")]
Unicode = Annotated[str, AfterValidator(_unicode)]
Stops = Annotated[
    Annotated[list[Annotated[Unicode, Field(min_length=1)]], Field(max_length=MAX_STOPS)] | None,
    BeforeValidator(_one_or_many),
    WithJsonSchema(_ONE_OR_MANY),
]


class Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class CalledFunction(Lenient):
    name: str
    arguments: str = Field(description="JSON text.")


class CalledTool(Lenient):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Lenient):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text = None
    name: str | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class AsSent(Lenient):
    """Remembers the object as it came: formats print it whole, and training printed the row's, key order included."""

    _sent: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        made = handler(data)
        made._sent = data
        return made

    @property
    def sent(self) -> dict[str, Any]:
        return self._sent


class FunctionSpec(Lenient):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON Schema of the arguments.")


class ToolType(AsSent):
    type: Literal["function"]


class ToolSpec(ToolType):
    function: FunctionSpec


class ResponseFormat(Lenient):
    type: Literal["text"]


class StreamOptions(Lenient):
    include_usage: bool | None = None


class SamplingFields(Lenient):
    """How tokens are drawn, in every kind of request; absent and null mean the plain distribution."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1: off.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)


class ChatRequest(SamplingFields):
    """`top_k`, `min_p` and `repetition_penalty` are extras: the SDK sends them through `extra_body`."""

    model: Unicode = Field(description="A base model, a fine-tuned model `ft:…`, or a checkpoint.")
    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[ToolSpec] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: Stops = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    functions: list[Any] | None = Field(None, description="Refused: use `tools`.")


class FunctionOut(TypedDict):
    name: str
    arguments: str


class ToolCallOut(TypedDict):
    id: str
    type: Literal["function"]
    function: FunctionOut
    index: NotRequired[int]  # in a stream only


class TokenLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int] | None  # null where a token is part of a character
    top_logprobs: list[Any]


class ChoiceLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class MessageOut(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallOut]]


class ChoiceOut(TypedDict):
    index: int
    message: MessageOut
    logprobs: ChoiceLogprobs | None
    finish_reason: str


class PromptDetails(TypedDict):
    cached_tokens: int
    audio_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class InvalidCall(TypedDict):
    """A tool call that could not be read; its text stands in the message's content as the model wrote it."""

    choice: int
    error: str


class Hone(TypedDict):
    """What has no place in the OpenAI schema: which weights answered, where, and which calls were not valid."""

    policy: str
    sampler: str
    invalid_calls: list[InvalidCall]


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChoiceOut]
    usage: Usage
    system_fingerprint: str | None
    hone: Hone


class Delta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str
    tool_calls: list[ToolCallOut]


class ChunkChoice(TypedDict):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: str | None


class ChatChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    system_fingerprint: str | None
    usage: NotRequired[Usage | None]
    hone: NotRequired[Hone]
