"""A request as the service understands it, and how a chat request becomes one: defaults filled in, rules checked.

Does not cover: the shape of single fields (`schemas`), whether the model exists (`resolution`), what fits (`service`),
and how `/v1/responses` says the same (`responses.request`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from app.core.errors import InvalidRequest
from app.inference.schemas import INT64, ChatMessage, ChatRequest, SamplingFields

ChatDict = dict[str, Any]


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Every value is sent to the sampler: an absent one would take the model's own default."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int | None

    def seed_of(self, choice: int) -> int | None:
        """Choices of one request differ, and the whole request can still be repeated."""
        return None if self.seed is None else (self.seed + choice) % INT64


def sampling(fields: SamplingFields) -> Sampling:
    return Sampling(
        temperature=1.0 if fields.temperature is None else fields.temperature,
        top_p=1.0 if fields.top_p is None else fields.top_p,
        top_k=max(fields.top_k or 0, 0),
        min_p=fields.min_p or 0.0,
        repetition_penalty=fields.repetition_penalty or 1.0,
        seed=fields.seed,
    )


@dataclass(frozen=True)
class Ask:
    """One checked request. `max_tokens` None: as much as fits. `tools` None: a tool call is plain text.

    `root` and `places` are the fields of the request that the messages, and each of them, were read from.
    """

    model: str
    messages: tuple[ChatDict, ...]
    tools: tuple[ChatDict, ...] | None
    parallel: bool
    n: int
    sampling: Sampling
    stop: tuple[str, ...]
    max_tokens: int | None
    logprobs: bool
    stream: bool
    include_usage: bool
    root: str = "messages"
    places: tuple[str, ...] = ()

    def field(self, param: str) -> str:
        """The caller's name of a path into the messages: `messages.2.content` may be `input.4.content` to him."""
        first, *rest = param.split(".")
        if first != "messages" or not self.places:
            return param
        return ".".join([self.places[int(rest[0])], *rest[1:]]) if rest else self.root


def read(request: ChatRequest) -> Ask:
    """Raises InvalidRequest with the path of the field that is wrong."""
    _refuse_what_would_be_ignored(request)
    tools = tuple(tool.sent for tool in request.tools or ())
    return Ask(
        model=request.model,
        messages=tuple(_messages(request.messages)),
        tools=tools if tools and request.tool_choice != "none" else None,
        parallel=request.parallel_tool_calls is not False,
        n=request.n or 1,
        sampling=sampling(request),
        stop=tuple(request.stop or ()),
        max_tokens=request.max_completion_tokens or request.max_tokens,
        logprobs=bool(request.logprobs),
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
    )


def _refuse_what_would_be_ignored(request: ChatRequest) -> None:
    """A field that changes the answer is refused rather than dropped without a word."""
    for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
        if getattr(request, name):
            raise InvalidRequest(
                f"{name} is not supported here; leave it out (repetition_penalty is available).", param=name
            )
    if request.functions:
        raise InvalidRequest("functions is not supported; describe the functions in tools.", param="functions")
    if request.top_logprobs:
        raise InvalidRequest(
            "top_logprobs above 0 is not supported; logprobs: true gives the sampled tokens.", param="top_logprobs"
        )
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options is only allowed with stream: true.", param="stream_options")


def _messages(messages: list[ChatMessage]) -> list[ChatDict]:
    called: set[str] = set()
    read_messages = []
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        if message.role == "tool" and message.tool_call_id not in called:
            raise InvalidRequest(
                f"A message with role 'tool' must answer a tool call of an earlier assistant message; "
                f"tool_call_id is {message.tool_call_id!r}.",
                param=f"{where}.tool_call_id",
            )
        if message.tool_calls and message.role != "assistant":
            raise InvalidRequest("Only an assistant message may have tool_calls.", param=f"{where}.tool_calls")
        if message.content is None and not message.tool_calls:
            raise InvalidRequest("The message has neither content nor tool_calls.", param=f"{where}.content")
        called.update(call.id for call in message.tool_calls or ())
        read_messages.append(message.model_dump(exclude_none=True))
    return read_messages
