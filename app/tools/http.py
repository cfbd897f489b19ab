"""One tool call over HTTP: the request of contract §7.3, and what its answer means to the model or to the rollout.

Does not cover: which calls a turn makes and in what order (`workers.rollouts`), retries and caps (`app.net.exchange`),
or the shape in which a job names its tools (`app.tools.schemas`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from app.core import tracing
from app.net.clients import CONNECT_TIMEOUT_S, HttpClient, InvalidURL, TimeoutException, TransportError
from app.net.endpoint import Mask, quote, show_url
from app.net.exchange import MAX_BODY_BYTES, Answer, Retry, Unanswered, Watch, post_json
from app.net.guard import EgressDenied

_LIMIT = f"{MAX_BODY_BYTES // (1024 * 1024)} MB"


@dataclass(frozen=True)
class ToolEndpoint:
    """Where a tool of the job answers. `headers` are secrets; `mask` knows the job's other ones."""

    name: str
    server_url: str
    headers: Mapping[str, str] = field(repr=False)
    mask: Mask = field(default_factory=Mask)

    @cached_property
    def hidden(self) -> Mask:
        """For all that it says: neither the model nor a trace, an event or a log is to learn a secret."""
        return self.mask | Mask.of(self.headers)


@dataclass(frozen=True)
class FunctionCall:
    """One call as the model made it. `id` is `fc_…`, `call_id` `call_…`; `arguments` is JSON text."""

    id: str
    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class CallContext:
    """The rollout on whose behalf a request leaves. `split` is "train" or "valid"; `item` is the dataset row."""

    trace_id: str
    item: Mapping[str, Any]
    job_id: str
    step: int
    split: str

    def headers(self) -> dict[str, str]:
        """What a simple endpoint can log without parsing the body."""
        return {
            "X-Rollout-Id": self.trace_id,
            "X-Job-Id": self.job_id,
            "X-Step": str(self.step),
            "X-Split": self.split,
        }


@dataclass(frozen=True)
class ToolOutcome:
    """What the model is shown, secrets masked. is_error: the endpoint refused (4xx), or a size was passed (413)."""

    output: str
    status: int
    attempts: int
    seconds: float
    is_error: bool


class ToolFailed(Exception):
    """Infrastructure, not behaviour: the rollout is discarded. Its text holds no header value."""

    def __init__(self, tool: str, url: str, attempts: int, last_error: str) -> None:
        self.tool = tool
        self.url = show_url(url)
        self.attempts = attempts
        self.last_error = last_error
        super().__init__(f"tool {tool!r} at {self.url} failed after {attempts} attempt(s): {last_error}")


class EndpointUnreachable(Exception):
    """A dial found nobody who speaks HTTP at this URL."""

    def __init__(self, url: str, reason: str) -> None:
        self.url = url
        self.reason = reason
        super().__init__(f"{url}: {reason}")


async def call_tool(
    http: HttpClient,
    endpoint: ToolEndpoint,
    call: FunctionCall,
    context: CallContext,
    *,
    timeout_s: float,
    deadline: float | None,
    retry: Retry | None = None,
    watch: Watch | None = None,
) -> ToolOutcome:
    """Make the call; every attempt carries the same `call_id`, so an endpoint can drop a repeated one.

    timeout_s bounds one attempt, `deadline` (time.monotonic()) all of them together; `watch` hears how each ended.
    Raises ToolFailed.
    """
    body = json.dumps(
        {
            "type": "function_call",
            "id": call.id,
            "call_id": call.call_id,
            "name": call.name,
            "arguments": call.arguments,
            "trace_id": context.trace_id,
            "item": dict(context.item),
        },
        ensure_ascii=False,
    ).encode("utf-8", "replace")  # a lone surrogate from the model is not worth a rollout
    if len(body) > MAX_BODY_BYTES:
        return _too_large(call.name, "request", attempts=0, seconds=0.0)
    headers = request_headers(endpoint.headers, context, f"{context.trace_id}:{call.call_id}")
    try:
        answer = await post_json(
            http, endpoint.server_url, body, headers,
            timeout_s=timeout_s, deadline=deadline, retry=retry, watch=watch, mask=endpoint.mask,
        )  # fmt: skip
    except Unanswered as error:
        raise ToolFailed(endpoint.name, error.url, error.attempts, error.last_error) from None
    if answer.body is None:
        return _too_large(call.name, "response", answer.attempts, answer.seconds)
    refused = answer.status >= 400
    output = _refusal(answer) if refused else _output(answer.body)
    if output is None:
        # The contract is silent here. What the model would read is not what the tool said, so it is a fault.
        said = quote(answer.body, endpoint.hidden | Mask.of(url=endpoint.server_url))
        reason = f"answered {answer.status} without a JSON object that holds 'output': {said}"
        raise ToolFailed(endpoint.name, endpoint.server_url, answer.attempts, reason)
    # Also of a success: what the model reads it may write, into traces, to graders, and to whoever chats with it.
    shown = endpoint.hidden(output)
    return ToolOutcome(shown, answer.status, answer.attempts, answer.seconds, is_error=refused)


def request_headers(own: Mapping[str, str], context: CallContext, idempotency_key: str) -> dict[str, str]:
    """The user's headers, then ours, which win over one of the same name in any case."""
    ours = {
        "Content-Type": "application/json",
        "Accept-Encoding": "identity",
        "Idempotency-Key": idempotency_key,
        **context.headers(),
    }
    tracing.inject(ours)
    taken = {name.lower() for name in ours}
    return {**{name: value for name, value in own.items() if name.lower() not in taken}, **ours}


async def dial(http: HttpClient, url: str, *, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
    """Find out whether somebody speaks HTTP at `url`: any status counts, the body is not read.

    HEAD without the user's headers: it must not run the tool. Raises EndpointUnreachable within twice `timeout_s`.
    """
    try:
        async with asyncio.timeout(2 * timeout_s), http.stream("HEAD", url, timeout=timeout_s):
            return
    except (TimeoutException, TimeoutError):
        reason = f"no HTTP answer within {timeout_s:g} s"
    except (EgressDenied, TransportError) as error:
        reason = str(error) or type(error).__name__
    except (InvalidURL, UnicodeError):
        reason = "not a valid URL"
    raise EndpointUnreachable(show_url(url), Mask.of(url=url)(reason))


def _output(body: bytes) -> str | None:
    """`output`, or `result.output`, as text; JSON text when it is not a string (contract §7.4); None without one."""
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError):
        return None
    for holder in (payload, payload.get("result") if isinstance(payload, dict) else None):
        if isinstance(holder, dict) and "output" in holder:
            value = holder["output"]
            return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return None


def _refusal(answer: Answer) -> str:
    """What the model reads of a 4xx: its `output`, else the whole payload, else the bare status."""
    body = answer.body or b""
    return _output(body) or body.decode("utf-8", "replace").strip() or f"Error {answer.status}"


def _too_large(tool: str, which: str, attempts: int, seconds: float) -> ToolOutcome:
    text = f"Error 413: the {which} of {tool} is larger than {_LIMIT}"
    return ToolOutcome(text, 413, attempts, seconds, is_error=True)
