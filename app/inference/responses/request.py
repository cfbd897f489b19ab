"""A responses request as the service understands it: items become chat messages, refusals name their reason.

Does not cover: the shape of single fields (`schemas`). The messages are those that a chat request with the same
conversation has, so that one trained format answers both.
"""

from __future__ import annotations

from app.core.errors import InvalidRequest
from app.inference.request import Ask, ChatDict, sampling
from app.inference.responses.schemas import FunctionTool, InputItem, ResponsesRequest

LOGPROBS = "message.output_text.logprobs"
SPOKEN = ("name", "description", "parameters")  # what the model is told of a tool


def read(request: ResponsesRequest) -> Ask:
    """Raises InvalidRequest with the path of the field that is wrong."""
    _refuse_what_would_be_ignored(request)
    conversation = _Conversation()
    if request.instructions is not None:
        conversation.add("instructions", {"role": "system", "content": request.instructions})
    for index, item in enumerate(request.input):
        conversation.take(f"input.{index}", item)
    if not conversation.messages:
        raise InvalidRequest("input has no item; send at least one message.", param="input")
    tools = tuple(_chat_tool(tool) for tool in request.tools or ())
    return Ask(
        model=request.model,
        messages=tuple(conversation.messages),
        tools=tools if tools and request.tool_choice != "none" else None,
        parallel=request.parallel_tool_calls is not False,
        n=1,
        sampling=sampling(request),
        stop=(),
        max_tokens=request.max_output_tokens,
        logprobs=LOGPROBS in (request.include or ()),
        stream=bool(request.stream),
        include_usage=True,
        root="input",
        places=tuple(conversation.places),
    )


class _Conversation:
    """Items in, chat messages out. Calls join the assistant's message before them: the model wrote them in one turn."""

    def __init__(self) -> None:
        self.messages: list[ChatDict] = []
        self.places: list[str] = []
        self._called: set[str] = set()
        self._turn: ChatDict | None = None  # the assistant message that a call may still join
        self._reasoning: str | None = None

    def add(self, place: str, message: ChatDict) -> None:
        self.messages.append(message)
        self.places.append(place)

    def take(self, place: str, item: InputItem) -> None:
        match item.type:
            case "message":
                self._message(place, item)
            case "reasoning":
                self._turn, self._reasoning = None, item.content
            case "function_call":
                self._call(place, item)
            case "function_call_output":
                self._output(place, item)

    def _message(self, place: str, item: InputItem) -> None:
        role, content = _required(place, item, "role"), _required(place, item, "content")
        if role == "assistant":
            self._assistant(place)["content"] = content
        else:
            self._turn, self._reasoning = None, None
            self.add(place, {"role": role, "content": content})

    def _assistant(self, place: str) -> ChatDict:
        message: ChatDict = {"role": "assistant"}
        if self._reasoning is not None:
            message["reasoning_content"] = self._reasoning
        self._turn, self._reasoning = message, None
        self.add(place, message)
        return message

    def _call(self, place: str, item: InputItem) -> None:
        call_id = _required(place, item, "call_id")
        function = {"name": _required(place, item, "name"), "arguments": _required(place, item, "arguments")}
        turn = self._turn or self._assistant(place)
        turn.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})
        self._called.add(call_id)

    def _output(self, place: str, item: InputItem) -> None:
        call_id = _required(place, item, "call_id")
        if call_id not in self._called:
            raise InvalidRequest(
                f"No function_call before this output has the call_id {call_id!r}; send the call as well, "
                f"this server keeps no earlier responses.",
                param=f"{place}.call_id",
            )
        self._turn, self._reasoning = None, None
        self.add(place, {"role": "tool", "content": _required(place, item, "output"), "tool_call_id": call_id})


def _required(place: str, item: InputItem, name: str) -> str:
    value: str | None = getattr(item, name)
    if value is None:
        raise InvalidRequest(
            f"Missing required parameter: '{place}.{name}' (of a {item.type}).",
            param=f"{place}.{name}",
            code="missing_required_parameter",
        )
    return value


def _chat_tool(tool: FunctionTool) -> ChatDict:
    """Key order as sent: formats print the object whole."""
    return {"type": "function", "function": {key: tool.sent[key] for key in tool.sent if key in SPOKEN}}


def _refuse_what_would_be_ignored(request: ResponsesRequest) -> None:
    stateless = "this server stores no responses; send the earlier items in input."
    refused = {
        "previous_response_id": (request.previous_response_id, stateless),
        "conversation": (request.conversation, stateless),
        "prompt": (request.prompt, "there are no stored prompts here; send the text in instructions."),
        "background": (request.background, "this server stores no responses; wait for the answer."),
        "truncation": (request.truncation not in (None, "disabled"), "nothing is cut here; send 'disabled'."),
        "top_logprobs": (request.top_logprobs, f"above 0 is not supported; include {LOGPROBS!r} instead."),
        "text.format": (_format(request) != "text", "only type 'text': nothing here forces an answer into a schema."),
    }
    for param, (given, reason) in refused.items():
        if given:
            raise InvalidRequest(f"{param}: {reason}", param=param, code="unsupported_value")


def _format(request: ResponsesRequest) -> str:
    return request.text.format.type if request.text and request.text.format else "text"
