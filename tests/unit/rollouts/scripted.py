"""Exact fakes of what a trajectory talks to: a renderer of characters, scripted policy and grader, tools as functions.

Does not cover: real formats (`tests/unit/rendering`) and real HTTP (`tests/unit/tools`).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from app.graders.base import Grade, Sample
from app.rendering.protocol import ParsedCall, ParsedTurn
from app.samplers.client import Completion
from app.tools.http import CallContext, ToolEndpoint
from workers.rollouts.trajectory import Setting, TurnRequest, run_rollout
from workers.rollouts.types import Ended, Limits, RolloutKey, Row, Trajectory

END = "\0"  # the end-of-turn token
LOOKUP = '!lookup {"item": "hat"}'
LIMITS = Limits(
    max_steps=4,
    max_tokens_per_turn=100,
    max_tokens_per_episode=1000,
    context=4000,
    tool_timeout_s=5.0,
    grader_timeout_s=5.0,
    rollout_timeout_s=10.0,
)


def ids(text: str) -> list[int]:
    return [ord(character) for character in text]


def text(token_ids: Sequence[int]) -> str:
    return "".join(chr(token) for token in token_ids)


class CharRenderer:
    """A token is a character. `a|!lookup {"item": 1}|!find {}` is text and two calls; bad JSON is unreadable."""

    stop_token_ids = (0,)
    holds = True  # False: no bridge

    def stop_strings(self, *, parallel: bool) -> tuple[str, ...]:
        return () if parallel else ("}",)

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> list[int]:
        offered = "".join(f"[{tool['function']['name']}]" for tool in tools or ())
        return ids(offered + "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>")

    def bridge(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        new_messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> list[int] | None:
        added = "".join(f"<tool>{message['content']}" for message in new_messages) + "<assistant>"
        return [*prompt_ids, *completion_ids, *ids(added)] if self.holds else None

    def parse(
        self,
        completion_ids: Sequence[int],
        tools: Sequence[Mapping[str, Any]] | None,
        prompt_ids: Sequence[int] | None = None,
    ) -> ParsedTurn:
        parts = text(completion_ids).rstrip(END).split("|")
        calls = tuple(_call(part) for part in parts if part.startswith("!"))
        return ParsedTurn("".join(part for part in parts if not part.startswith("!")), None, calls)

    def decode(self, token_ids: Sequence[int]) -> str:
        return text(token_ids)


def _call(part: str) -> ParsedCall:
    name, _, arguments = part[1:].partition(" ")
    try:
        json.loads(arguments)
    except ValueError:
        return ParsedCall(name, "", "invalid JSON", part)
    return ParsedCall(name, arguments, None, part)


def completion(said: str, finish: str = "stop", turn: int = 0) -> Completion:
    """`said` sampled with an end-of-turn token unless it was cut; log-probs tell turn and position."""
    tokens = ids(said if finish == "length" else said + END)
    log_probs = tuple(-(turn + 1) - index / 1000 for index in range(len(tokens)))
    return Completion("adapter", tuple(tokens), log_probs, said, finish, None, 0, None)  # type: ignore[arg-type]


@dataclass
class ScriptedPolicy:
    """Says `script` turn by turn to every rollout; an exception in it is raised. `before` runs first."""

    script: Sequence[str | Completion | Exception]
    requests: list[TurnRequest] = field(default_factory=list)
    before: Callable[[TurnRequest], Awaitable[None]] | None = None

    async def turn(self, request: TurnRequest) -> Completion:
        self.requests.append(request)
        if self.before is not None:
            await self.before(request)
        number = int(request.request_id.rsplit("-", 1)[1])
        said = self.script[min(number, len(self.script) - 1)]
        if isinstance(said, Exception):
            raise said
        return completion(said, turn=number) if isinstance(said, str) else said


@dataclass
class ScriptedGrader:
    """`score` is a number, an exception, or a function of the context."""

    score: float | Exception | Callable[[CallContext], float | Exception] = 1.0
    seen: list[tuple[Sample, CallContext]] = field(default_factory=list)

    async def grade(
        self, sample: Sample, item: Mapping[str, Any], context: CallContext, *, deadline: float | None = None
    ) -> Grade:
        self.seen.append((sample, context))
        score = self.score(context) if callable(self.score) else self.score
        if isinstance(score, Exception):
            raise score
        return Grade(score)


Tool = Callable[[dict[str, Any]], Awaitable[tuple[int, Any]]]


async def _body(payload: Any) -> AsyncIterator[bytes]:
    yield json.dumps(payload).encode()


class Tools:
    """The user's tool server: name → coroutine of the request's body to (status, JSON). Remembers what it was asked."""

    def __init__(self, **tools: Tool) -> None:
        self._tools = tools
        self.seen: list[dict[str, Any]] = []
        self.http = httpx.AsyncClient(transport=httpx.MockTransport(self._answer))

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.seen.append(body)
        status, payload = await self._tools[body["name"]](body)
        return httpx.Response(status, content=_body(payload))

    @property
    def endpoints(self) -> dict[str, ToolEndpoint]:
        return {name: ToolEndpoint(name, f"http://tools.test/{name}", {}) for name in self._tools}


def says(value: Any, status: int = 200) -> Tool:
    async def answer(body: dict[str, Any]) -> tuple[int, Any]:
        return status, {"output": value}

    return answer


async def broken(body: dict[str, Any]) -> tuple[int, Any]:
    """Answers, but not as the contract says: a fault that is not retried."""
    return 200, {"nothing": True}


def row(index: int = 0, *tools: str, **item: Any) -> Row:
    offered = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in tools]
    messages = [{"role": "user", "content": f"row {index}"}]
    return Row(index, {"messages": messages, **({"tools": offered} if tools else {}), **item})


def key(**values: Any) -> RolloutKey:
    fields = {"id": "trace_1", "step": 1, "split": "train", "row": 0, "group": 1, "sample": 0, "version": 3}
    return RolloutKey(**{**fields, **values})


_EXECUTOR = ThreadPoolExecutor(1)


def setting(policy: Any, grader: Any = None, tools: Tools | None = None, **values: Any) -> Setting:
    tools = tools or Tools()
    return Setting(
        **{
            "job_id": "ftjob-1",
            "renderer": CharRenderer(),
            "policy": policy,
            "http": tools.http,
            "endpoints": tools.endpoints,
            "grader": grader or ScriptedGrader(),
            "limits": LIMITS,
            "executor": _EXECUTOR,
            **values,
        }
    )


def answered(trajectory: Trajectory, prompt: Sequence[int], said: Sequence[int]) -> None:
    """One call: the prompt as it stands after `prompt` was appended, and what was sampled at log-prob -1."""
    trajectory.tree.current.give(prompt)
    asked = trajectory.ids[:]
    rates = [-1.0] * len(said)
    trajectory.tree.record(asked, said, rates, model="m", version=3, sampler=None, finish_reason="stop", seconds=0.1)


async def roll(where: Setting, what: Row, **values: Any) -> Ended:
    return await run_rollout(where, key(**values), what, Trajectory())


def limited(**values: Any) -> Any:
    return replace(LIMITS, **values)


def ended(reward: float | None, *, group: int = 1, sample: int = 0, tokens: int = 2, **values: Any) -> Ended:
    """A finished rollout without an episode; `reward` None: discarded by an infrastructure fault."""
    trajectory = Trajectory()
    answered(trajectory, [1], [1] * tokens)
    for name, value in values.pop("trajectory", {}).items():
        setattr(trajectory, name, value)
    grade = None if reward is None else Grade(reward)
    where = key(id=f"g{group}s{sample}", group=group, sample=sample, **values.pop("key", {}))
    return Ended(where, trajectory, grade, values.pop("state", None), values.pop("error", None))
