"""What the orchestrator costs: tool calls a second with thousands of trajectories in flight, against a bare loop.

A simulated sampler (40 tokens after 0.5 to 1.5 s), a tool server in a process of its own, histories of 2,000 tokens.
Ours: the product's pool, admission, trajectories, guarded client, ledger (SQLite) and traces. Bare: coroutines that
sleep as long and post the same bodies over `httpx.AsyncClient` with the same connection limit, once as it comes and
once with a semaphore before it, because httpx itself slows down when many requests wait for its connections; the ratio
is to the better of the two. `bare+shards` shows what our own transport alone would give. Each side runs in a process of
its own. Also: memory for each trajectory in flight (slope of the resident set between two sizes, all histories at full
length) and the lag of the event loop.
Does not cover: a real renderer and sampler, graders over HTTP, the trainer.

    python benchmarks/bench_orchestrator.py [--trajectories N] [--seconds S] [--rounds R]

The last line is `ratio=…` (ours / bare, medians).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script

GROUP, TURNS, PROMPT, SAID, READ = 8, 5, 1500, 40, 60  # 1500 + 5 x (40 + 60) = 2000 tokens
CONNECTIONS = 512  # `app.net.clients.USER_CONNECTIONS`
SLEEP = (0.5, 1.5)
WARM_UP_S = 10.0
ANSWER = "The order of the customer was sent on Monday and will arrive within three days. " * 3
ARGUMENTS = json.dumps({"order": 12345, "fields": ["status", "carrier"]})
ITEM = {
    "messages": [{"role": "system", "content": "You help. " * 450}, {"role": "user", "content": "Where is it? " * 20}],
    "tools": [{"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}],
    "answer": "within three days",
}


# --- the tool server: as little as HTTP/1.1 needs, so that it is never what limits ---


class ToolServer(asyncio.Protocol):
    body = json.dumps({"output": ANSWER}).encode()
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    def connection_made(self, transport: Any) -> None:
        self._transport, self._buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._buffer) < end + 4 + length:
                return
            self._buffer = self._buffer[end + 4 + length :]
            self._transport.write(self.answer)


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(ToolServer, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# --- both sides ---


class Counter:
    """Tool calls, and how late the event loop comes back to a timer."""

    def __init__(self) -> None:
        self.calls = 0
        self.lags: list[float] = []

    async def watch_loop(self) -> None:
        while True:
            due = time.perf_counter() + 0.01
            await asyncio.sleep(0.01)
            self.lags.append(time.perf_counter() - due)

    async def figures(self, seconds: float) -> dict[str, Any]:
        """Counted over `seconds` after the warm-up."""
        await asyncio.sleep(WARM_UP_S)
        self.lags.clear()
        calls, began, cpu = self.calls, time.perf_counter(), time.process_time()
        await asyncio.sleep(seconds)
        calls, wall, cpu = self.calls - calls, time.perf_counter() - began, time.process_time() - cpu
        lags = sorted(self.lags)
        return {
            "calls_per_s": round(calls / wall, 1),
            "cpu_ms_per_call": round(1000 * cpu / max(calls, 1), 3),
            "lag_p50_ms": round(1000 * lags[len(lags) // 2], 1),
            "lag_p99_ms": round(1000 * lags[int(len(lags) * 0.99)], 1),
        }


def nap() -> float:
    return random.uniform(*SLEEP)


async def bare(url: str, args: argparse.Namespace, counter: Counter, kind: str) -> dict[str, Any]:
    """The loop that somebody would write first, the one that would be second, and that one over our small pools."""
    import httpx

    from app.net.shards import ShardedTransport

    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
    turn = asyncio.Semaphore(1_000_000 if kind == "bare" else CONNECTIONS)
    shards = ShardedTransport(lambda limits: httpx.AsyncHTTPTransport(verify=False, limits=limits), CONNECTIONS)
    transport = shards if kind == "bare+shards" else None

    async def trajectory(client: httpx.AsyncClient, number: int) -> None:
        while True:
            for call in range(TURNS):
                await asyncio.sleep(nap())
                body = {
                    "type": "function_call", "id": f"fc_{call}", "call_id": f"call_{call}", "name": "lookup",
                    "arguments": ARGUMENTS, "trace_id": f"trace_{number}", "item": ITEM,
                }  # fmt: skip
                headers = {
                    "Content-Type": "application/json", "Idempotency-Key": f"trace_{number}:call_{call}",
                    "X-Rollout-Id": f"trace_{number}", "X-Job-Id": "ftjob-1", "X-Step": "1", "X-Split": "train",
                }  # fmt: skip
                content = json.dumps(body, ensure_ascii=False).encode()
                async with turn:
                    response = await client.post(url, content=content, headers=headers)
                assert response.json()["output"] == ANSWER
                counter.calls += 1
            await asyncio.sleep(nap())

    timeout = httpx.Timeout(120.0)
    async with httpx.AsyncClient(transport=transport, limits=limits, timeout=timeout, trust_env=False) as client:
        tasks = [asyncio.create_task(trajectory(client, number)) for number in range(args.trajectories)]
        tasks.append(asyncio.create_task(counter.watch_loop()))
        try:
            return await counter.figures(args.seconds)
        finally:
            await _end(tasks)


# --- ours ---


class TokenTable:
    """A renderer that costs next to nothing: fixed numbers of tokens, one readable call until the last turn."""

    stop_token_ids = (2,)

    def stop_strings(self, *, parallel: bool) -> tuple[str, ...]:
        return ()

    def prompt(self, messages: Sequence[Any], tools: Any) -> list[int]:
        return _tokens(PROMPT)

    def bridge(self, prompt_ids: Any, completion_ids: Any, new_messages: Any, tools: Any) -> list[int]:
        return [*prompt_ids, *completion_ids, *_tokens(READ)]

    def parse(self, completion_ids: Sequence[int], tools: Any, prompt_ids: Sequence[int] | None = None) -> Any:
        from app.rendering.protocol import ParsedCall, ParsedTurn

        if prompt_ids is not None and len(prompt_ids) >= PROMPT + TURNS * (SAID + READ):
            return ParsedTurn("It arrives within three days.", None, ())
        return ParsedTurn("I look.", None, (ParsedCall("lookup", ARGUMENTS, None, "…"),))

    def decode(self, ids: Sequence[int]) -> str:
        return ""


class Sampler:
    """Sleeps, then says `SAID` fresh tokens. `held`: those at their last turn wait, for the measure of memory."""

    def __init__(self, *, hold: bool) -> None:
        self._hold = asyncio.Event() if hold else None
        self.held = 0

    async def turn(self, request: Any) -> Any:
        from app.samplers.client import Completion

        if self._hold is not None and len(request.prompt_ids) >= PROMPT + TURNS * (SAID + READ):
            self.held += 1
            await self._hold.wait()
        await asyncio.sleep(nap())
        log_probs = tuple(random.random() for _ in range(SAID))
        return Completion("job-a1-v0", tuple(_tokens(SAID)), log_probs, "", "stop", None, len(request.prompt_ids), None)

    async def loads(self) -> Any:
        """Neither empty nor full: the limit stays where it is."""
        from app.samplers.metrics import SamplerLoad

        return [SamplerLoad(running=1, waiting=0, kv_usage=0.7, preemptions=0, generation_tokens=0)]


def _tokens(count: int) -> list[int]:
    """Fresh integers, as JSON from a sampler would give."""
    first = random.randrange(1000, 100_000)
    return list(range(first, first + count))


class CoinGrader:
    async def grade(self, sample: Any, item: Mapping[str, Any], context: Any, *, deadline: float | None = None) -> Any:
        from app.graders.base import Grade

        return Grade(float(random.random() < 0.5))


@asynccontextmanager
async def recorder(directory: Path) -> AsyncIterator[Any]:
    """The product's recorder over a migrated SQLite database with one running job."""
    from app.core.settings import Settings
    from app.db import migrate
    from app.db.engine import Database, now
    from app.db.tables import DEFAULT_PROJECT, Job
    from app.jobs.leases import Fence
    from workers.rollouts.recorder import Recorder

    settings = Settings(data_dir=directory)
    settings.root.mkdir(parents=True, exist_ok=True)
    migrate.upgrade(settings.database)
    database = Database(settings.database)
    async with database.begin() as session:
        session.add(
            Job(
                id="ftjob-1", project_id=DEFAULT_PROJECT, status="running", attempt=1, model="simulated",
                training_file="file-a", validation_file="file-b", seed=7, method={}, options={}, created_at=now(),
            )
        )  # fmt: skip
    made = Recorder(database, Fence("ftjob-1", 1, DEFAULT_PROJECT), directory / "traces", {})
    try:
        yield made
    finally:
        await database.close()


def pool(
    url: str, args: argparse.Namespace, sampler: Sampler, made: Any, http: Any, executor: Any, counter: Any
) -> Any:
    """The product's pool as `workers.run` builds it, with the sampler, the renderer and the grader replaced."""
    from app.tools.http import ToolEndpoint
    from workers.rollouts.congestion import Congestion
    from workers.rollouts.pool import Pool
    from workers.rollouts.trajectory import Setting
    from workers.rollouts.types import Limits

    def count(record: Any) -> None:
        assert record.output == ANSWER, record
        counter.calls += 1

    congestion = Congestion(floor=GROUP, ceiling=args.trajectories, start=args.trajectories)
    limits = Limits(
        max_steps=TURNS + 1, max_tokens_per_turn=SAID, max_tokens_per_episode=4096, context=4096,
        tool_timeout_s=120.0, grader_timeout_s=60.0, rollout_timeout_s=600.0,
    )  # fmt: skip
    setting = Setting(
        job_id="ftjob-1", renderer=TokenTable(), policy=sampler, http=http,
        endpoints={"lookup": ToolEndpoint("lookup", url, {})}, grader=CoinGrader(), limits=limits, executor=executor,
        gate=congestion, on_tool=count,
    )  # fmt: skip
    return Pool(setting, made, congestion, group_size=GROUP), congestion


async def ours(url: str, args: argparse.Namespace, counter: Counter, *, hold: bool) -> dict[str, Any]:
    """Steps one after the other, the next always begun, so that the admission is what bounds."""
    from app.net.clients import EgressPolicy, guarded_client
    from workers.rollouts.collector import spare_live_objects
    from workers.rollouts.stream import RowStream
    from workers.rollouts.types import Row

    sampler = Sampler(hold=hold)
    stream = RowStream([Row(index, ITEM) for index in range(64)], 7)
    batch = max(1, args.trajectories // GROUP)
    # A thread that still writes traces when its task is cancelled is no fault of the measurement.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory, ThreadPoolExecutor(2) as executor:
        async with (
            recorder(Path(directory)) as made,
            guarded_client(EgressPolicy.parse("127.0.0.0/8:*"), timeout_s=120.0, max_connections=CONNECTIONS) as http,
        ):
            spare_live_objects()
            it, congestion = pool(url, args, sampler, made, http, executor, counter)

            async def steps(first: int) -> None:
                step = first
                while True:
                    await it.step(step, 0, stream, batch)
                    step += 2

            tasks = [asyncio.create_task(steps(first)) for first in ((1,) if hold else (1, 2))]
            tasks += [asyncio.create_task(made.run()), asyncio.create_task(counter.watch_loop())]
            tasks.append(asyncio.create_task(congestion.poll(sampler.loads)))
            try:
                if not hold:
                    return await counter.figures(args.seconds) | {"calls_at_once": congestion.describe()["tools"]}
                while sampler.held < batch * GROUP:
                    await asyncio.sleep(0.2)
                    for task in tasks:
                        if task.done():
                            task.result()
                gc.collect()
                await asyncio.sleep(4.0)  # idle connections are let go after 3 s
                return {"rss": _resident(), "held": sampler.held}
            finally:
                await _end(tasks)


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(ended, Exception):
            raise ended


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# --- the run ---


async def side(args: argparse.Namespace) -> None:
    counter = Counter()
    if args.side in ("ours", "memory"):
        found = await ours(args.url, args, counter, hold=args.side == "memory")
    else:
        found = await bare(args.url, args, counter, args.side)
    print(json.dumps(found), flush=True)


@contextmanager
def tool_server() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, __file__, "--side", "server"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/lookup"
    finally:
        process.terminate()
        process.wait(10)


def measure(name: str, url: str, trajectories: int, seconds: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", name, "--url", url, "--seconds", str(seconds)]
    done = subprocess.run(
        [*command, "--trajectories", str(trajectories)], stdout=subprocess.PIPE, text=True, check=True, timeout=1800
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name:>15}: {found}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", default="")
    parser.add_argument("--url", default="")
    args = parser.parse_args()
    if args.side:
        asyncio.run(serve() if args.side == "server" else side(args))
        return
    print(f"{args.trajectories} trajectories, {CONNECTIONS} connections, {os.cpu_count()} cores")
    rates: dict[str, list[float]] = {}
    lags: list[float] = []
    with tool_server() as url:
        for _ in range(args.rounds):
            for name in ("ours", "bare", "bare+semaphore", "bare+shards"):
                found = measure(name, url, args.trajectories, args.seconds)
                rates.setdefault(name, []).append(found["calls_per_s"])
                if name == "ours":
                    lags.append(found["lag_p99_ms"])
        few, many = args.trajectories // 8, args.trajectories
        small, large = (measure("memory", url, count, 0.0) for count in (few, many))
    slope = (large["rss"] - small["rss"]) / (large["held"] - small["held"]) / 1024
    median = {name: statistics.median(found) for name, found in rates.items()}
    best = max(median["bare"], median["bare+semaphore"])
    print(f"tool calls a second: {median}")
    print(f"event-loop lag p99, median of rounds: {statistics.median(lags):.1f} ms")
    print(f"memory for each trajectory in flight: {slope:.1f} KiB")
    print(f"ratio={median['ours'] / best:.2f}")


if __name__ == "__main__":
    main()
