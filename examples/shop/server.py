"""The shop's own server, as a user would write it: one tool, one grader, a bearer token. Plain FastAPI, knows no Hone.

    python -m examples.shop.server --port 9000 --token secret

Does not cover: state. Price and grade follow from the salt and the request alone, so any number of copies may run.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import secrets
import socket
from collections.abc import Mapping
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Header, HTTPException
from pydantic import BaseModel

from examples.shop.data import ITEMS, NUMBER, SHOTS, price

GOODS = {*ITEMS, *SHOTS}


class ToolRequest(BaseModel):
    """What the service sends for one tool call; `trace_id` is the rollout and would be the key of any state."""

    id: str
    call_id: str
    name: str
    arguments: str | dict[str, Any]
    trace_id: str
    item: dict[str, Any]


class GradeRequest(BaseModel):
    """What the service sends when an episode has ended. `item` is the whole dataset row."""

    sample: dict[str, Any]
    item: dict[str, Any]
    trace_id: str


def create_app(salt: str, token: str) -> FastAPI:
    """The application; `salt` decides every price, `token` is what the `Authorization` header must carry."""

    def authorised(authorization: str = Header("")) -> None:
        if not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "missing or wrong bearer token")

    app = FastAPI(title="shop")

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/tools/lookup", dependencies=[Depends(authorised)])
    async def lookup(call: ToolRequest) -> dict[str, str]:
        return {
            "type": "function_call_output",
            "id": call.id,
            "call_id": call.call_id,
            "output": answer_lookup(salt, call.arguments),
        }

    @app.post("/grade", dependencies=[Depends(authorised)])
    async def grade(request: GradeRequest) -> dict[str, Any]:
        return score(salt, request.sample, request.item)

    return app


def answer_lookup(salt: str, arguments: str | Mapping[str, Any]) -> str:
    """The price, or what is wrong in words: the model reads it either way and may try again."""
    wanted = item_of(arguments)
    if wanted is None:
        return "error: bad arguments"
    return str(price(salt, wanted)) if wanted in GOODS else "error: 'no such item'"


def item_of(arguments: Any) -> str | None:
    """The item a call asks for; None if its arguments are not an object with the text `item`."""
    found = read_object(arguments)
    item = None if found is None else found.get("item")
    return item.strip().lower() if isinstance(item, str) else None


def read_object(arguments: Any) -> dict[str, Any] | None:
    """Arguments arrive as JSON text; None if that text is not an object."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    return arguments if isinstance(arguments, dict) else None


def score(salt: str, sample: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """0.2 for a valid call, 0.3 for the right argument, 0.5 for the exact answer, −0.1 a call over the budget, or 0.

    The parts start the climb: at first few answers are exact, but most groups differ in the parts. With several items
    in the row they share the 0.3, the answer must name all prices in order, and the budget is a call for each.
    """
    wanted: list[str] = row.get("items") or [row["item"]]
    calls = [(call.get("function") or {}) for call in sample.get("output_tools") or []]
    calls = [call for call in calls if call.get("name") and read_object(call.get("arguments")) is not None]
    lookups = [item_of(call["arguments"]) for call in calls if call["name"] == "lookup"]
    numbers = NUMBER.findall(sample.get("output_text") or "")
    prices = [str(price(salt, item)) for item in wanted]

    valid = float(bool(lookups))
    right = sum(item in lookups for item in wanted) / len(wanted)
    exact = float(numbers[-len(prices) :] == prices and not cut_off(sample))
    extra = float(max(0, len(calls) - len(wanted)))
    total = max(0.0, 0.2 * valid + 0.3 * right + 0.5 * exact - 0.1 * extra)
    parts = {"valid_call": valid, "right_item": right, "exact_answer": exact, "extra_calls": extra}
    return {"score": round(total, 6), "scores": parts}


def cut_off(sample: Mapping[str, Any]) -> bool:
    """Whether the episode ended by a limit and not by a final answer."""
    choices = sample.get("choices") or [{}]
    return choices[-1].get("finish_reason") not in (None, "stop")


def main() -> None:
    """Serve on 127.0.0.1 and print the address alone on the first line; port 0 takes a free one."""
    parser = argparse.ArgumentParser(description="The shop's tool and grader server.")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--salt", default=os.environ.get("SHOP_SALT") or secrets.token_hex(8))
    parser.add_argument("--token", default=os.environ.get("SHOP_TOKEN") or "shop-secret")
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", options.port), backlog=512) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        config = uvicorn.Config(create_app(options.salt, options.token), log_level="warning", access_log=False)
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
