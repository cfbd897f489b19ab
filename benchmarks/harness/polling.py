"""Clients that poll: each on a connection of its own asks for a job, then for its events, again and again.

Does not cover: how many such processes run, and what their figures mean (`bench_service`). Run as
`python -m benchmarks.harness.polling`; the key comes in `BENCH_KEY`, the figures leave as a line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time

import httpx

KEY = "BENCH_KEY"


class Times:
    """Seconds of each answer to what was asked after the warm-up, and the CPU seconds that asking took."""

    def __init__(self, warm_up_s: float, length_s: float) -> None:
        self.since = time.monotonic() + warm_up_s
        self.until = self.since + length_s
        self.seconds: list[float] = []
        self.cpu_s = 0.0

    async def measure(self) -> None:
        """Says when the warm-up is over, so that others measure the same seconds."""
        await asyncio.sleep(self.since - time.monotonic())
        self.cpu_s = -time.process_time()
        print("measuring", flush=True)
        await asyncio.sleep(self.until - time.monotonic())
        self.cpu_s += time.process_time()


async def poll(url: str, job: str, pause_s: float, times: Times, rng: random.Random) -> None:
    """One client. Anything but a 200 ends the benchmark."""
    headers = {"Authorization": f"Bearer {os.environ[KEY]}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60, trust_env=False) as http:
        await asyncio.sleep(rng.random() * pause_s)  # or all would ask at once
        while time.monotonic() < times.until:
            for path in (f"/v1/fine_tuning/jobs/{job}", f"/v1/fine_tuning/jobs/{job}/events?limit=20"):
                asked = time.monotonic()
                answer = await http.get(path)
                answer.raise_for_status()
                if times.since <= asked and time.monotonic() <= times.until:
                    times.seconds.append(time.monotonic() - asked)
            await asyncio.sleep(pause_s)


async def run(options: argparse.Namespace) -> Times:
    rng, jobs = random.Random(options.seed), options.jobs.split(",")
    times = Times(options.warm_up, options.seconds)
    async with asyncio.TaskGroup() as group:
        group.create_task(times.measure())
        for number in range(options.clients):
            job = jobs[(options.seed + number) % len(jobs)]
            group.create_task(poll(options.url, job, options.pause, times, rng))
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--jobs", required=True, help="ids, comma-separated")
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two rounds of a client")
    parser.add_argument("--warm-up", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    times = asyncio.run(run(parser.parse_args()))
    print(json.dumps({"cpu_s": times.cpu_s, "seconds": [round(each, 5) for each in times.seconds]}), flush=True)


if __name__ == "__main__":
    main()
