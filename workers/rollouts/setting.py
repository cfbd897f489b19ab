"""What all trajectories of a job share, and what they ask of others: the policy, and leave to call a tool.

Does not cover: one trajectory (`trajectory`), and who implements them (`workers.sampler.policy`, `congestion`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from app.graders.base import Grader
from app.net.clients import HttpClient
from app.rendering.protocol import ChatRenderer
from app.samplers.client import Completion
from app.tools.http import ToolEndpoint
from workers.rollouts.tool_gate import ToolTurn
from workers.rollouts.types import Limits, ToolRecord


@dataclass(frozen=True)
class TurnRequest:
    """What a policy is asked for: one assistant message at one version. `prompt_ids` is the request's own copy."""

    version: int
    prompt_ids: array[int]
    max_tokens: int
    temperature: float
    stop_token_ids: Sequence[int]
    stop: Sequence[str]
    request_id: str
    deadline: float  # monotonic


class Policy(Protocol):
    """Where turns come from; retries on infrastructure faults until the deadline, then raises `SamplerError`."""

    async def turn(self, request: TurnRequest) -> Completion: ...


class Gate(Protocol):
    """Leave to call a tool: entering waits while too many calls of it run. Raises `ToolBusy` at `deadline`."""

    def tool(self, name: str, deadline: float | None = None) -> AbstractAsyncContextManager[ToolTurn]: ...


class OpenGate:
    """Never waits."""

    def tool(self, name: str, deadline: float | None = None) -> AbstractAsyncContextManager[ToolTurn]:
        return nullcontext(ToolTurn(watch=lambda attempt: None, queued_s=0.0))


def nobody(record: ToolRecord) -> None:
    """The listener of a run that watches no tool."""


@dataclass(frozen=True)
class Setting:
    """Everything a trajectory needs and shares with all others of the job."""

    job_id: str
    renderer: ChatRenderer
    policy: Policy
    http: HttpClient
    endpoints: Mapping[str, ToolEndpoint]
    grader: Grader
    limits: Limits
    executor: Executor  # rendering and parsing: never on the event loop
    gate: Gate = OpenGate()  # noqa: RUF009  # stateless
    wants_json: bool = False  # the job has a `response_format`: the grader gets the answer parsed, too
    on_tool: Callable[[ToolRecord], None] = nobody  # told of every call that reached for an endpoint, failed ones too
