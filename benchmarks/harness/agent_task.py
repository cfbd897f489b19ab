"""The agent job of the benchmarks: two items, their prices, then what is left of each; two parallel calls a turn.

Does not cover: latency (`tool_server`), and teaching a model to do it (`taught_model`). Both sides of a benchmark use
these rows, these schemas, this answer and this score. No torch, no service.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ITEMS = ("hat", "scarf", "cup", "lamp", "book", "chair")
SYSTEM = "Answer with the tools."
NUMBER = re.compile(r"[0-9]+")
TURNS = 3  # assistant messages: prices, stock, answer
Message = dict[str, Any]


def _schema(name: str, description: str) -> dict[str, Any]:
    item = {"type": "string", "description": "The item."}
    parameters = {"type": "object", "properties": {"item": item}, "required": ["item"]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [_schema("lookup", "Get the price of an item."), _schema("stock", "Get how many of an item are left.")]
NAMES = tuple(tool["function"]["name"] for tool in TOOLS)


def answer_of(name: str, arguments: Any) -> str:
    """Two digits nobody can know without asking, or words for the model."""
    item = arguments.get("item") if isinstance(arguments, dict) else None
    if not isinstance(item, str):
        return "error: bad arguments"
    return str(10 + zlib.crc32(f"{name}:{item.strip().lower()}".encode()) % 90)


def question(first: str, second: str) -> str:
    return f"What do the {first} and the {second} cost?"


def calls(name: str, items: Sequence[str]) -> Message:
    """An assistant message with one call for each item."""
    made = [
        {
            "id": f"call_{name}_{at}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps({"item": item})},
        }
        for at, item in enumerate(items)
    ]
    return {"role": "assistant", "content": "", "tool_calls": made}


def results(name: str, items: Sequence[str], outputs: Sequence[str]) -> list[Message]:
    return [
        {"role": "tool", "tool_call_id": f"call_{name}_{at}", "name": name, "content": output}
        for at, (_, output) in enumerate(zip(items, outputs, strict=True))
    ]


def episode(items: Sequence[str], prices: Sequence[str], left: Sequence[str]) -> list[Message]:
    """A finished episode, question to answer: what a model is taught and what a worked example shows."""
    return [
        {"role": "user", "content": question(*items)},
        calls("lookup", items),
        *results("lookup", items, prices),
        calls("stock", items),
        *results("stock", items, left),
        {"role": "assistant", "content": f"The answer is {prices[0]} and {prices[1]}."},
    ]


def rows(count: int, *, worked_examples: int, seed: int = 0) -> list[dict[str, Any]]:
    """Dataset rows. `worked_examples` finished episodes stand before the question, for a model that was not taught."""
    rng = random.Random(seed)
    shown = [episode(("pot", "ring"), ("84", "31"), ("12", "45")), episode(("ring", "pot"), ("31", "84"), ("45", "12"))]
    examples = [message for example in shown[:worked_examples] for message in example]
    found = []
    for _ in range(count):
        items = rng.sample(ITEMS, 2)
        messages = [{"role": "system", "content": SYSTEM}, *examples, {"role": "user", "content": question(*items)}]
        found.append({"messages": messages, "tools": TOOLS, "parallel_tool_calls": True, "wanted": items})
    return found


def score(made: Iterable[tuple[str, Any]], text: str, wanted: Sequence[str]) -> float:
    """0.15 for each of the four right calls, up to 0.2 for each price by how near the answer's number in its place is.

    By distance, so that hardly a group is constant: a constant group would be refilled by one side only.
    """
    asked = {(name, arguments.get("item")) for name, arguments in made if isinstance(arguments, dict)}
    right = sum((name, item) in asked for name in NAMES for item in wanted)
    prices = [answer_of("lookup", {"item": item}) for item in wanted]
    named = NUMBER.findall(text)[-len(prices) :]
    near = sum(max(0.0, 1 - abs(int(a) - int(b)) / 100) for a, b in zip(named, prices, strict=False))
    return round(0.15 * right + 0.2 * near, 6)


def score_sample(sample: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """The same from what the service sends to a grader.

    A row that wants nothing gets a number that means nothing, from the text alone: random weights earn no other, and
    every group then has something to learn from.
    """
    if "wanted" not in row:
        text = str(sample.get("output_text")) + json.dumps(sample.get("output_tools"))
        return zlib.crc32(text.encode()) % 1000 / 1000
    functions = [call.get("function") or {} for call in sample.get("output_tools") or ()]
    made = [(str(function.get("name")), read_arguments(function.get("arguments"))) for function in functions]
    return score(made, sample.get("output_text") or "", row["wanted"])


def read_arguments(arguments: Any) -> Any:
    """Arguments are an object, or JSON text that may be broken: None then."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except ValueError:
        return None
