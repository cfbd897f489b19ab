"""The shop's goods and the questions about them: dataset rows for a reinforcement job.

Does not cover: the prices a row asks for. They follow from a salt that only the server (`examples.shop.server`) knows,
so neither the model nor a row can hold them: the only way to the right answer is the tool.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ADJECTIVES = (
    "red", "blue", "green", "black", "white", "yellow", "small", "large", "old", "new", "heavy", "light",
)  # fmt: skip
NOUNS = (
    "basket", "lamp", "chair", "table", "bottle", "mirror", "clock", "blanket", "pillow", "kettle",
    "ladder", "bucket", "broom", "candle", "carpet", "drum", "fan", "guitar", "hammer", "jacket",
    "knife", "lantern", "mug", "notebook", "oven", "pan", "plate", "radio", "rope", "saw",
    "shovel", "sofa", "spoon", "tent", "towel", "tray", "umbrella", "vase", "wallet", "wheel",
)  # fmt: skip
ITEMS = tuple(f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS)
FORMS = (
    "How much is the {item}?",
    "What is the price of the {item}?",
    "What does the {item} cost?",
    "How many dollars is the {item}?",
    "I want to buy the {item}. What do I pay?",
)
SHOTS = {"brown hat": 84, "pink scarf": 31}  # worked examples: in no row, and with fixed prices
SYSTEM = "Answer with the tools."
LOOKUP = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Get the price of an item in dollars.",
        "parameters": {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]},
    },
}
NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
ROWS = 64  # of each kind: 8 steps of 8 rows, and as many to measure on

Row = dict[str, Any]
Message = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One agent to train. `max_tokens` bounds an assistant message, `max_steps` their number in an episode."""

    name: str
    train: Sequence[Row]
    valid: Sequence[Row]
    parallel: bool
    max_tokens: int
    max_steps: int


def price(salt: str, item: str) -> int:
    """Dollars, 3 to 196: a hash nobody can know without the salt."""
    if item in SHOTS:
        return SHOTS[item]
    return 3 + int.from_bytes(hashlib.sha256(f"{salt}:{item}".encode()).digest()[:8], "big") % 194


def shop_task(seed: int) -> Task:
    """64 rows to train on and 64 held out, no item in both."""
    order = random.Random(f"shop:{seed}")
    items = order.sample(ITEMS, 2 * ROWS)
    rows = [shop_row(item, order.choice(FORMS)) for item in items]
    return Task("shop", rows[:ROWS], rows[ROWS:], parallel=False, max_tokens=48, max_steps=3)


def shop_row(item: str, form: str) -> Row:
    """One line of the dataset. `item` and `form` are free keys: the grader gets them with every rollout."""
    shots = (
        *worked_example("How much is the brown hat?", ["brown hat"], "The answer is 84."),
        *worked_example("What is the price of the pink scarf?", ["pink scarf"], "The answer is 31."),
    )
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            *shots,
            {"role": "user", "content": form.format(item=item)},
        ],
        "tools": [LOOKUP],
        "parallel_tool_calls": False,
        "item": item,
        "form": form,
    }


def worked_example(question: str, items: Sequence[str], answer: str) -> list[Message]:
    """A finished episode as chat turns. As text in the system prompt it teaches a small model nothing."""
    calls = [
        {
            "id": f"call_{item.replace(' ', '_')}",
            "type": "function",
            "function": {"name": "lookup", "arguments": json.dumps({"item": item})},
        }
        for item in items
    ]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": str(SHOTS[item])}
        for call, item in zip(calls, items, strict=True)
    ]
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": None, "tool_calls": calls},
        *results,
        {"role": "assistant", "content": answer},
    ]


def jsonl(rows: Sequence[Row]) -> bytes:
    """The rows as a file for `client.files.create`."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
