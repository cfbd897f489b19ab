"""The agent task scores both sides of a benchmark alike."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.harness import agent_task
from benchmarks.harness.agent_task import answer_of, score, score_sample

WANTED = ["hat", "cup"]
EVERY_CALL = [(name, {"item": item}) for name in agent_task.NAMES for item in WANTED]
PRICES = [answer_of("lookup", {"item": item}) for item in WANTED]
ANSWER = f"The answer is {PRICES[0]} and {PRICES[1]}."


def test_the_whole_task_scores_one_and_nothing_scores_nothing() -> None:
    assert score(EVERY_CALL, ANSWER, WANTED) == 1.0
    assert score([], "", WANTED) == 0.0


def test_a_nearer_number_scores_more_so_that_few_groups_are_constant() -> None:
    off = [str(int(PRICES[0]) + wrong) for wrong in (1, 9)]
    scores = [score(EVERY_CALL, f"{first} and {PRICES[1]}", WANTED) for first in off]
    assert 0.8 < scores[1] < scores[0] < 1.0


def test_prices_in_the_wrong_order_and_repeated_calls_earn_less() -> None:
    assert score(EVERY_CALL, f"{PRICES[1]} and {PRICES[0]}", WANTED) < 1.0
    assert score([EVERY_CALL[0]] * 4, "", WANTED) == 0.15


def test_a_graders_request_scores_as_the_plain_calls_do() -> None:
    def as_sent(arguments: str) -> dict[str, Any]:
        return {"type": "function", "function": {"name": "lookup", "arguments": arguments}}

    sample = {"output_text": ANSWER, "output_tools": [as_sent('{"item": "hat"}'), as_sent("{broken")]}
    assert score_sample(sample, {"wanted": WANTED}) == pytest.approx(0.15 + 0.4)


def test_a_row_that_wants_nothing_gets_a_number_from_the_text_alone() -> None:
    scores = {score_sample({"output_text": text}, {}) for text in ("a", "b", "a")}
    assert len(scores) == 2
    assert all(0 <= value < 1 for value in scores)


def test_rows_are_the_same_for_both_sides_and_ask_for_two_items() -> None:
    assert agent_task.rows(8, worked_examples=2) == agent_task.rows(8, worked_examples=2)
    assert all(len(set(row["wanted"])) == 2 for row in agent_task.rows(8, worked_examples=0))
