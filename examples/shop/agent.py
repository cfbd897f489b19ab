"""Measure a model as its users would meet it: a tool loop over /v1/chat/completions, graded by the shop's own grader.

Does not cover: training. The loop keeps the rules of the service's rollouts, so that both measure the same thing: a
message without a readable call, or one that was cut off, is the last; an unknown tool is answered with an error.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import threading
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from openai import OpenAI

from examples.shop.data import NUMBER, Message, Row, Task

CONCURRENT = 64
CHAT_TIMEOUT_S = 300.0  # 64 episodes share two cores
SHOP_TIMEOUT_S = 30.0
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Shop:
    """The user's endpoints, as the job names them."""

    url: str
    token: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One JSON request; raises urllib.error.URLError (a refusal is one, too)."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json", **self.headers}
        )
        with NO_PROXY.open(request, timeout=SHOP_TIMEOUT_S) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


@dataclass
class Episode:
    """One conversation from the question on. `calls` were answered, `refused` of them with an error."""

    row: Row
    written: list[Message] = field(default_factory=list)  # what followed the question
    results: list[str] = field(default_factory=list)
    calls: int = 0
    refused: int = 0
    unreadable: int = 0  # calls that were no JSON: nobody could answer them
    completion_tokens: int = 0
    reward: float = 0.0

    @property
    def answer(self) -> str:
        return str(self.written[-1].get("content") or "")

    @property
    def invented(self) -> bool:
        """The answer ends in a number that no tool returned."""
        stated = NUMBER.findall(self.answer)
        return bool(stated) and stated[-1] not in self.results


@dataclass(frozen=True)
class Measured:
    """Means over episodes; `reward_se` is the standard error of the reward, `tool_error_rate` a share of calls."""

    reward_mean: float
    reward_se: float
    tool_calls_mean: float
    tool_error_rate: float
    invented_rate: float
    completion_tokens_mean: float
    n: int
    episodes: Sequence[Episode]


class Agent:
    """One model playing episodes of one task."""

    def __init__(self, client: OpenAI, shop: Shop, task: Task, model: str) -> None:
        # A first request may find the model still loading: the service answers 503 with Retry-After until it is there.
        self._client = client.with_options(max_retries=20, timeout=CHAT_TIMEOUT_S)
        self._shop, self._task, self._model = shop, task, model

    def measure(self, samples: int, temperature: float, seed: int, progress: Callable[[int, int], None]) -> Measured:
        """`samples` episodes for every held-out row, many at once; the first failure ends it and is raised."""
        stop, finished, total = threading.Event(), itertools.count(1), samples * len(self._task.valid)

        def one(number: int) -> Episode:
            if stop.is_set():
                raise RuntimeError("stopped after a failure")
            try:
                row = self._task.valid[number % len(self._task.valid)]
                episode = self.play(row, temperature, seed * 1_000_000 + number * 1_000)
            except BaseException:
                stop.set()
                raise
            progress(next(finished), total)
            return episode

        with ThreadPoolExecutor(CONCURRENT) as pool:
            try:
                return summarise(list(pool.map(one, range(total))))
            except BaseException:
                stop.set()
                raise

    def play(self, row: Row, temperature: float, seed: int) -> Episode:
        """Question, calls and results in turn, until a message without a call or the step limit; then the grade."""
        episode = Episode(row)
        trace_id = f"trace_{uuid.uuid4()}"
        asked: list[dict[str, Any]] = []
        for turn in range(self._task.max_steps):
            messages: Any = [*row["messages"], *episode.written]
            completion = self._client.chat.completions.create(
                model=self._model,
                messages=messages,
                tools=row["tools"],
                parallel_tool_calls=self._task.parallel,
                max_completion_tokens=self._task.max_tokens,
                temperature=temperature,
                top_p=1.0,
                seed=(seed + turn) % 2**31,
            )
            choice = completion.choices[0]
            text, calls = choice.message.content or "", [call.model_dump() for call in choice.message.tool_calls or []]
            asked += calls
            episode.unreadable += len((getattr(completion, "hone", None) or {}).get("invalid_calls", []))
            episode.completion_tokens += completion.usage.completion_tokens if completion.usage else 0
            episode.written.append({"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})})
            if not calls or choice.finish_reason == "length" or turn + 1 == self._task.max_steps:
                break
            for call in calls:
                self._answer(episode, call, trace_id)
        sample = {
            "choices": [{"index": 0, "finish_reason": choice.finish_reason, "message": episode.written[-1]}],
            "output_text": episode.answer,
            "output_json": None,
            "output_tools": asked,
        }
        grade = self._shop.post("/grade", {"sample": sample, "item": row, "trace_id": trace_id})
        episode.reward = float(grade["score"])
        return episode

    def _answer(self, episode: Episode, call: dict[str, Any], trace_id: str) -> None:
        function = call["function"]
        if function["name"] in {tool["function"]["name"] for tool in episode.row["tools"]}:
            body = {
                "type": "function_call",
                "id": f"fc_{uuid.uuid4().hex}",
                "call_id": call["id"],
                "name": function["name"],
                "arguments": function["arguments"],
                "trace_id": trace_id,
                "item": episode.row,
            }
            output = str(self._shop.post(f"/tools/{function['name']}", body)["output"])
        else:
            output = f"error: unknown tool {function['name']!r}"
        episode.calls += 1
        episode.refused += output.startswith("error:")
        episode.results.append(output)
        episode.written.append({"role": "tool", "tool_call_id": call["id"], "content": output})


def summarise(episodes: Sequence[Episode]) -> Measured:
    """The table's numbers from at least two episodes."""
    rewards = [episode.reward for episode in episodes]
    calls = sum(episode.calls for episode in episodes)
    unreadable = sum(episode.unreadable for episode in episodes)
    refused = sum(episode.refused for episode in episodes)
    return Measured(
        reward_mean=statistics.fmean(rewards),
        reward_se=statistics.stdev(rewards) / math.sqrt(len(rewards)),
        tool_calls_mean=calls / len(episodes),
        tool_error_rate=(unreadable + refused) / max(1, calls + unreadable),
        invented_rate=statistics.fmean(episode.invented for episode in episodes),
        completion_tokens_mean=statistics.fmean(episode.completion_tokens for episode in episodes),
        n=len(episodes),
        episodes=episodes,
    )
