"""The benchmarks' tool server: seeded latencies, long replies, counters."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.harness.agent_task import answer_of
from benchmarks.harness.latency import Lognormal
from benchmarks.harness.tool_server import ToolServer


async def ask(server: ToolServer, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """One request through the ASGI interface."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await server({"type": "http", "method": "POST", "path": path}, receive, send)
    answer: dict[str, Any] = json.loads(sent[1]["body"])
    return answer


async def test_the_same_seed_waits_the_same_whoever_calls() -> None:
    server = ToolServer(Lognormal.of(0.001, 0.005))
    waited = []
    for tool in ("lookup", "stock"):
        await ask(server, "/reset", {"seed": 3})
        for _ in range(5):
            await ask(server, f"/tools/{tool}", {"arguments": '{"item": "hat"}'})
        waited.append((await ask(server, "/seen", {}))["waited_s"])
    assert waited[0] == waited[1] > 0


async def test_a_reset_changes_the_latency_and_clears_the_counters() -> None:
    server = ToolServer(Lognormal.of(0.001, 0.005))
    await ask(server, "/tools/stock", {"arguments": '{"item": "cup"}'})
    await ask(server, "/reset", {"mean_s": 0, "p99_s": 0})
    answer = await ask(server, "/tools/stock", {"arguments": '{"item": "cup"}'})
    seen = await ask(server, "/seen", {})
    assert answer["output"] == answer_of("stock", {"item": "cup"})
    assert (seen["calls"], seen["waited_s"], seen["in_flight"]) == (1, 0.0, 0)


async def test_a_row_may_ask_for_a_long_page() -> None:
    server = ToolServer(Lognormal.of(0, 0))
    body = {"arguments": '{"item": "cup"}', "item": {"reply_words": 500}}
    assert len((await ask(server, "/tools/lookup", body))["output"].split()) == 501
