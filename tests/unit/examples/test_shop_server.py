"""The shop's server as the service meets it: the wire contract and the arithmetic of the grade."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from examples.shop.data import price
from examples.shop.server import create_app, score

SALT = "salt"
HEADERS = {"Authorization": "Bearer t"}
ROW = {"item": "red lamp"}
PRICE = price(SALT, "red lamp")


@pytest.fixture
def shop() -> TestClient:
    return TestClient(create_app(SALT, "t"), headers=HEADERS)


def tool_request(arguments: Any) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": "fc_1",
        "call_id": "call_1",
        "name": "lookup",
        "arguments": arguments,
        "trace_id": "trace_1",
        "item": ROW,
    }


def sample(text: str, *items: str, finish: str = "stop", name: str = "lookup") -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": name, "arguments": json.dumps({"item": i})}} for i in items]
    return {"output_text": text, "output_tools": calls, "choices": [{"finish_reason": finish}]}


def test_lookup_answers_with_the_price_and_the_ids_it_was_asked_with(shop: TestClient) -> None:
    answer = shop.post("/tools/lookup", json=tool_request('{"item": "red lamp"}')).json()
    assert answer == {"type": "function_call_output", "id": "fc_1", "call_id": "call_1", "output": str(PRICE)}


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        ({"item": "Red Lamp "}, str(PRICE)),
        ('{"item": "gold lamp"}', "error: 'no such item'"),
        ('{"name": "red lamp"}', "error: bad arguments"),
        ('{"item": 7}', "error: bad arguments"),
        ('["red lamp"]', "error: bad arguments"),
        ('{"item": ', "error: bad arguments"),
    ],
)
def test_lookup_says_in_words_what_is_wrong(shop: TestClient, arguments: Any, output: str) -> None:
    assert shop.post("/tools/lookup", json=tool_request(arguments)).json()["output"] == output


@pytest.mark.parametrize("path", ["/tools/lookup", "/grade"])
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer other"}, {"Authorization": "t"}])
def test_a_request_without_the_token_is_refused(path: str, headers: dict[str, str]) -> None:
    assert TestClient(create_app(SALT, "t")).post(path, json={}, headers=headers).status_code == 401


def test_health_needs_no_token() -> None:
    assert TestClient(create_app(SALT, "t")).get("/healthz").status_code == 200


def test_a_grade_is_a_score_with_its_parts(shop: TestClient) -> None:
    body = {"sample": sample(f"The answer is {PRICE}.", "red lamp"), "item": ROW, "trace_id": "trace_1"}
    assert shop.post("/grade", json=body).json() == {
        "score": 1.0,
        "scores": {"valid_call": 1.0, "right_item": 1.0, "exact_answer": 1.0, "extra_calls": 0.0},
    }


@pytest.mark.parametrize(
    ("episode", "expected"),
    [
        (sample(f"It was 12, now {PRICE}", "red lamp"), 1.0),
        (sample(f"{PRICE} or 12", "red lamp"), 0.5),
        (sample(f"The answer is {PRICE}.5", "red lamp"), 0.5),
        (sample(f"The answer is {PRICE}", "red lamp", finish="length"), 0.5),
        (sample("The answer is 1.", "blue lamp"), 0.2),
        (sample(f"The answer is {PRICE}."), 0.5),
        (sample(f"The answer is {PRICE}.", "blue lamp", "red lamp"), 0.9),
        (sample("", "red lamp", "red lamp", "red lamp", finish="tool_calls"), 0.3),
        (sample("Nothing.", *["blue lamp"] * 5), 0.0),
        (sample("The answer is 1.", "red lamp", name="price"), 0.0),
        (sample(""), 0.0),
        ({"output_text": None, "output_tools": None}, 0.0),
    ],
)
def test_the_score_adds_up(episode: dict[str, Any], expected: float) -> None:
    assert score(SALT, episode, ROW)["score"] == pytest.approx(expected)


def test_unreadable_arguments_are_no_valid_call() -> None:
    broken = {"function": {"name": "lookup", "arguments": '{"item": '}}
    assert score(SALT, {"output_text": "", "output_tools": [broken]}, ROW)["scores"]["valid_call"] == 0.0


def test_a_pair_needs_both_prices_in_order_and_may_call_twice() -> None:
    row = {"items": ["red lamp", "old sofa"]}
    right, wrong = f"{PRICE} and {price(SALT, 'old sofa')}", f"{price(SALT, 'old sofa')} and {PRICE}"
    assert score(SALT, sample(right, "red lamp", "old sofa"), row)["score"] == pytest.approx(1.0)
    assert score(SALT, sample(wrong, "red lamp", "old sofa"), row)["score"] == pytest.approx(0.5)
    assert score(SALT, sample("The answer is 1.", "red lamp"), row)["score"] == pytest.approx(0.35)
