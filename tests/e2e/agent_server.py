"""The user's side of the end-to-end tests: a tool and a grader behind HTTP, as a process of its own.

Run as `python -m tests.e2e.agent_server PORT`. Refuses requests without its bearer header; counts what it saw. What is
under `/echo` takes any header and says it back wherever there is room for words: the worst server for secrets.
"""

from __future__ import annotations

import json
import sys
import zlib
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

TOKEN = "Bearer agent-secret"

app = FastAPI()
seen: dict[str, Any] = {"lookup": 0, "grade": 0, "traces": {}, "splits": {}, "echoed": {}, "events": []}


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


def _echo(request: Request) -> dict[str, str]:
    """The headers as they came; `seen` keeps which way they went back, and how often."""
    way = request.url.path.removeprefix("/echo/")
    seen["echoed"][way] = seen["echoed"].get(way, 0) + 1
    return dict(sorted(request.headers.items()))  # the beginning is what messages quote: `authorization` is in it


@app.post("/echo/lookup")
async def echo_lookup(request: Request) -> Any:
    """A refusal, then an answer, then a refusal, …"""
    headers = _echo(request)
    if seen["echoed"]["lookup"] % 2:
        return JSONResponse({"error": "not for you", "headers": headers}, 400)
    return {"output": {"price": 31, "for": headers}}


@app.post("/echo/grade")
async def echo_grade(request: Request) -> dict[str, Any]:
    """The score differs within a group, so that something is trained."""
    body, headers = await request.json(), _echo(request)
    said = ", ".join(f"{name}: {value}" for name, value in headers.items())
    score = zlib.crc32(body["trace_id"].encode()) % 100 / 100
    return {"score": score, "reason": f"sent with {said}", "scores": {said: 1.0}, "request": headers}


@app.post("/echo/broken")
async def echo_broken(request: Request) -> Any:
    return JSONResponse({"error": "out of order", "headers": _echo(request)}, 503)


@app.post("/echo/hook")
async def echo_hook(request: Request) -> Any:
    """Takes each event at its second attempt."""
    headers, event = _echo(request), await request.json()
    known = event["id"] in seen["events"]
    seen["events"].append(event["id"])
    return {} if known else JSONResponse({"headers": headers}, 500)


@app.get("/seen")
async def what_was_seen() -> dict[str, Any]:
    return seen


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
