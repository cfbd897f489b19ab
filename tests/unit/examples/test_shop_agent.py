"""The measuring loop: what counts as an answer, a call, an invalid call and an invented price."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient
from openai import OpenAI

from examples.pairs.data import pairs_task
from examples.shop.agent import Agent, Episode, Shop, summarise
from examples.shop.data import Task, price, shop_task
from examples.shop.server import create_app

SALT = "salt"


class ScriptedClient:
    """Answers as the test wrote down; a turn is a text, or a list of (tool, item) calls."""

    def __init__(self, *turns: Any) -> None:
        self.asked: list[dict[str, Any]] = []
        self._turns = list(turns)
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._create))

    def with_options(self, **_options: Any) -> ScriptedClient:
        return self

    def _create(self, **request: Any) -> Any:
        self.asked.append(request)
        turn = self._turns.pop(0)
        text, calls = (turn, []) if isinstance(turn, str) else (None, [self._call(*call) for call in turn])
        message = SimpleNamespace(content=text, tool_calls=calls or None)
        broken = [{"choice": 0, "error": "invalid JSON"}] if text and "<tool_call>" in text else []
        return SimpleNamespace(
            choices=[SimpleNamespace(message=message, finish_reason="tool_calls" if calls else "stop")],
            usage=SimpleNamespace(completion_tokens=10),
            hone={"invalid_calls": broken},
        )

    def _call(self, name: str, item: str) -> Any:
        function = {"name": name, "arguments": json.dumps({"item": item})}
        return SimpleNamespace(model_dump=lambda: {"id": f"call_{item}", "type": "function", "function": function})


class LocalShop(Shop):
    """The real application without a socket."""

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = TestClient(create_app(SALT, self.token)).post(path, json=body, headers=self.headers)
        answer.raise_for_status()
        return cast("dict[str, Any]", answer.json())


def play(task: Task, *turns: Any) -> tuple[Episode, ScriptedClient]:
    client = ScriptedClient(*turns)
    agent = Agent(cast(OpenAI, client), LocalShop("http://shop", "t"), task, "model")
    return agent.play(task.valid[0], 1.0, 7), client


@pytest.fixture
def task() -> Task:
    return shop_task(1)


def test_a_looked_up_price_earns_the_full_reward(task: Task) -> None:
    item = task.valid[0]["item"]
    episode, client = play(task, [("lookup", item)], f"The answer is {price(SALT, item)}.")
    assert (episode.reward, episode.calls, episode.refused, episode.invented) == (1.0, 1, 0, False)
    assert episode.completion_tokens == 20
    assert client.asked[1]["messages"][-1] == {
        "role": "tool",
        "tool_call_id": f"call_{item}",
        "content": str(price(SALT, item)),
    }


def test_a_price_no_tool_returned_is_invented(task: Task) -> None:
    episode, _ = play(task, "<tool_response>45</tool_response>")
    assert (episode.reward, episode.calls, episode.invented) == (0.0, 0, True)


def test_an_unreadable_call_ends_the_episode_and_counts_as_invalid(task: Task) -> None:
    episode, client = play(task, '<tool_call>{"name": "lookup", "arguments": {"item"}}</tool_call>')
    assert (episode.reward, episode.calls, episode.unreadable) == (0.0, 0, 1)
    assert summarise([episode, episode]).tool_error_rate == 1.0
    assert len(client.asked) == 1


def test_an_unknown_tool_is_answered_with_an_error_and_the_episode_goes_on(task: Task) -> None:
    item = task.valid[0]["item"]
    answer = f"The answer is {price(SALT, item)}."
    episode, _ = play(task, [("search", item)], [("lookup", item)], answer)
    assert episode.written[1]["content"] == "error: unknown tool 'search'"
    assert (episode.calls, episode.refused) == (2, 1)
    assert episode.reward == pytest.approx(0.9)


def test_an_episode_ends_at_the_step_limit_without_an_answer(task: Task) -> None:
    item = task.valid[0]["item"]
    episode, client = play(task, *[[("lookup", item)]] * 5)
    assert len(client.asked) == task.max_steps == 3
    assert episode.reward == pytest.approx(0.3)


def test_a_pair_asked_in_parallel_can_be_answered_and_one_after_the_other_cannot() -> None:
    task = pairs_task(1)
    first, second = task.valid[0]["items"]
    answer = f"The answer is {price(SALT, first)} and {price(SALT, second)}."
    together, client = play(task, [("lookup", first), ("lookup", second)], answer)
    assert together.reward == pytest.approx(1.0)
    assert client.asked[0]["parallel_tool_calls"] is True
    apart, _ = play(task, [("lookup", first)], [("lookup", second)], answer)
    assert apart.reward == pytest.approx(0.5)


def test_every_held_out_row_is_played_as_often_as_asked(task: Task) -> None:
    agent = Agent(cast(OpenAI, ScriptedClient(*["5"] * 128)), LocalShop("http://shop", "t"), task, "model")
    ticks: list[tuple[int, int]] = []
    measured = agent.measure(2, 1.0, 1, lambda done, total: ticks.append((done, total)))
    assert measured.n == 128
    assert sorted(ticks)[-1] == (128, 128)
    asked = [episode.row["item"] for episode in measured.episodes]
    assert asked[:64] == asked[64:] == [row["item"] for row in task.valid]


def test_the_first_failure_ends_the_measurement(task: Task) -> None:
    agent = Agent(cast(OpenAI, ScriptedClient("5")), LocalShop("http://shop", "t"), task, "model")
    with pytest.raises((IndexError, RuntimeError)):
        agent.measure(1, 1.0, 1, lambda done, total: None)


def test_the_standard_error_is_that_of_the_mean() -> None:
    episodes = [Episode({}, [{"role": "assistant", "content": ""}], calls=1, reward=reward) for reward in (0, 1, 0, 1)]
    measured = summarise(episodes)
    assert measured.reward_mean == 0.5
    assert measured.reward_se == pytest.approx(math.sqrt(1 / 3) / 2)
