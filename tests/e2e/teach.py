"""Teaches a tiny model to answer with a tool call, in seconds: so that end-to-end tests exercise real tool loops.

Does not cover: the service's own trainer. This is plain supervised learning on the rendered text, run by the test only.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from app.models.catalogue import BaseModel
from app.rendering.registry import load_renderer

ITEMS = ("hat", "scarf", "cup", "lamp", "book", "chair")
LOOKUP = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Get the price of an item in dollars.",
        "parameters": {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]},
    },
}


def question(item: str) -> list[dict[str, object]]:
    return [
        {"role": "system", "content": "Answer with the tools."},
        {"role": "user", "content": f"How much is the {item}?"},
    ]


def conversation(item: str, price: int) -> list[dict[str, object]]:
    """Question, call, result, answer."""
    call = {"id": "call_1", "type": "function", "function": {"name": "lookup", "arguments": f'{{"item": "{item}"}}'}}
    return [
        *question(item),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "name": "lookup", "content": str(price)},
        {"role": "assistant", "content": f"The answer is {price}."},
    ]


def teach(model: BaseModel, *, steps: int = 120, seed: int = 0) -> None:
    """Train all weights in place until the model mostly calls `lookup`, and still errs often enough to learn from."""
    renderer = load_renderer(model)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    network = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = []
        for _ in range(8):
            messages = conversation(rng.choice(ITEMS), rng.randint(10, 99))
            # Everything but the opening of the next turn, which prompt() adds at the end.
            opening = len(renderer.prompt(messages, [LOOKUP])) - _opening(renderer, messages)
            batch.append(renderer.prompt(messages, [LOOKUP])[:opening])
        width = max(map(len, batch))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in batch])
        loss = network(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.save_pretrained(Path(model.path))


def _opening(renderer: object, messages: list[dict[str, object]]) -> int:
    longer = renderer.prompt([*messages, {"role": "user", "content": "x"}], [LOOKUP])  # type: ignore[attr-defined]
    shorter = renderer.prompt(messages, [LOOKUP])  # type: ignore[attr-defined]
    common = 0
    while common < len(shorter) and shorter[common] == longer[common]:
        common += 1
    return len(shorter) - common
