"""The dataset of the examples: valid rows, nothing leaked, the same for the same seed."""

from __future__ import annotations

import json

import pytest

from examples.pairs.data import pairs_task
from examples.shop.data import ITEMS, LOOKUP, SHOTS, Row, Task, jsonl, price, shop_task


def items_of(row: Row) -> list[str]:
    return row.get("items") or [row["item"]]


def test_prices_follow_from_the_salt_alone() -> None:
    assert [price("a", item) for item in ITEMS] == [price("a", item) for item in ITEMS]
    assert sum(price("a", item) == price("b", item) for item in ITEMS) < 20


def test_prices_lie_between_3_and_196() -> None:
    prices = {price(f"salt {number}", item) for number in range(5) for item in ITEMS}
    assert min(prices) == 3
    assert max(prices) == 196


@pytest.mark.parametrize("make", [shop_task, pairs_task])
def test_a_seed_gives_the_same_rows_and_another_seed_others(make: type[Task]) -> None:
    assert jsonl(make(1).train) == jsonl(make(1).train)
    assert jsonl(make(1).train) != jsonl(make(2).train)


@pytest.mark.parametrize("make", [shop_task, pairs_task])
def test_held_out_rows_share_no_item_with_the_training_rows(make: type[Task]) -> None:
    task = make(3)
    trained = {item for row in task.train for item in items_of(row)}
    held_out = {item for row in task.valid for item in items_of(row)}
    assert len(task.train) == len(task.valid) == 64
    assert not trained & held_out


@pytest.mark.parametrize("make", [shop_task, pairs_task])
def test_the_worked_examples_are_in_no_question(make: type[Task]) -> None:
    task = make(1)
    asked = [row["messages"][-1]["content"] for row in [*task.train, *task.valid]]
    assert not [question for question in asked for item in SHOTS if item in question]
    assert not set(SHOTS) & set(ITEMS)


@pytest.mark.parametrize("make", [shop_task, pairs_task])
def test_a_row_is_a_prompt_that_ends_with_the_user_and_holds_no_price(make: type[Task]) -> None:
    task = make(1)
    for row in map(json.loads, jsonl(task.train).decode().splitlines()):
        *before, question = row["messages"]
        assert question["role"] == "user"
        assert all(item in question["content"] for item in items_of(row))
        assert row["tools"] == [LOOKUP]
        assert row["parallel_tool_calls"] is task.parallel
        called = [call["id"] for message in before for call in message.get("tool_calls", [])]
        assert called == [message["tool_call_id"] for message in before if message["role"] == "tool"]
        rest = json.dumps([row["form"], items_of(row), question, row["tools"]])
        assert not any(character.isdigit() for character in rest)


def test_pairs_shows_both_calls_in_one_message() -> None:
    calling = [message for message in pairs_task(1).train[0]["messages"] if message.get("tool_calls")]
    assert [len(message["tool_calls"]) for message in calling] == [2, 2]
