"""Questions about two items of the shop, with worked examples that look both up in one message.

Does not cover: tool and grader. They are the shop's: a row with `items` is graded on all of them.
An episode has two assistant messages: calls one after the other leave none for the answer, only parallel ones score 1.
"""

from __future__ import annotations

import random

from examples.shop.data import ITEMS, LOOKUP, ROWS, SYSTEM, Row, Task, worked_example

FORM = "What do the {first} and the {second} cost?"


def pairs_task(seed: int) -> Task:
    """64 rows to train on and 64 held out, no item in both."""
    items = random.Random(f"pairs:{seed}").sample(ITEMS, 4 * ROWS)
    rows = [pairs_row(first, second) for first, second in zip(items[::2], items[1::2], strict=True)]
    return Task("pairs", rows[:ROWS], rows[ROWS:], parallel=True, max_tokens=72, max_steps=2)


def pairs_row(first: str, second: str) -> Row:
    """One line of the dataset. Both examples call in parallel: the style of the last one is what the model follows."""
    hat_first = worked_example(
        FORM.format(first="brown hat", second="pink scarf"), ["brown hat", "pink scarf"], "The answer is 84 and 31."
    )
    scarf_first = worked_example(
        FORM.format(first="pink scarf", second="brown hat"), ["pink scarf", "brown hat"], "The answer is 31 and 84."
    )
    question = {"role": "user", "content": FORM.format(first=first, second=second)}
    return {
        "messages": [{"role": "system", "content": SYSTEM}, *hat_first, *scarf_first, question],
        "tools": [LOOKUP],
        "parallel_tool_calls": True,
        "items": [first, second],
        "form": FORM,
    }
