"""The user's side of the end-to-end tests: a tool and a grader behind HTTP, as a process of its own.

Run as `python -m tests.e2e.agent_server PORT`. Refuses requests without its bearer header; counts what it saw.
"""

from __future__ import annotations

import json
import sys
import zlib
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request

TOKEN = "Bearer agent-secret"

app = FastAPI()
seen: dict[str, Any] = {"lookup": 0, "grade": 0, "traces": {}, "splits": {}}


def price(item: str) -> int:
    """A price nobody can know: it must be looked up."""
    return 10 + zlib.crc32(item.encode()) % 90


async def _body(request: Request) -> dict[str, Any]:
    if request.headers.get("authorization") != TOKEN:
        raise HTTPException(403, "no key")
    body: dict[str, Any] = await request.json()
    seen["splits"][request.headers["x-split"]] = seen["splits"].get(request.headers["x-split"], 0) + 1
    return body


@app.post("/lookup")
async def lookup(request: Request) -> dict[str, Any]:
    body = await _body(request)
    seen["lookup"] += 1
    seen["traces"].setdefault(body["trace_id"], []).append("lookup")
    item = json.loads(body["arguments"]).get("item", "")
    return {"type": "function_call_output", "call_id": body["call_id"], "id": body["id"], "output": str(price(item))}


@app.post("/grade")
async def grade(request: Request) -> dict[str, Any]:
    """0.3 for a call, 0.3 for the right item, 0.4 for the price in the answer."""
    body = await _body(request)
    seen["grade"] += 1
    seen["traces"].setdefault(body["trace_id"], []).append("grade")
    item = body["item"]["wanted"]
    calls = [call["function"] for call in body["sample"]["output_tools"]]
    score = 0.3 * bool(calls)
    score += 0.3 * any(f'"{item}"' in call["arguments"] for call in calls)
    score += 0.4 * (str(price(item)) in body["sample"]["output_text"])
    return {"score": score, "reason": f"{len(calls)} calls"}


@app.post("/broken")
async def broken() -> None:
    raise HTTPException(503, "out of order")


@app.get("/seen")
async def what_was_seen() -> dict[str, Any]:
    return seen


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
