"""The control plane on PostgreSQL and on SQLite: ratio = PostgreSQL's requests a second / SQLite's, medians of rounds.

    python -m benchmarks.bench_service [--clients 200] [--seconds 20] [--rounds 3] [--jobs 20]

Create to claim: a job made with the openai client → the moment at which a supervisor's claim of it was written, by the
database's clock. The worker is idle, its supervisor is the real one, whose start is most of the time, and the job is
cancelled right after. `rung`: `hone worker` on Redis. `polled`: the runner of `hone up`, which looks every 0.5 s.
Polling: clients on kept connections, in processes of their own, ask `hone api` for a job and for its events; first as
fast as they can, then each every `--pause` seconds, as scripts do. The jobs are full: 2,000 rollouts and 300 events.
PostgreSQL comes from a wheel, is reached over its Unix socket, and syncs every commit. All of it shares one machine:
the cores that each party used stand beside its figures and say what limits them.
Does not cover: several API processes or hosts, writers beside the readers, and a database across a network.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
from openai import OpenAI
from sqlalchemy import insert, select

from app.core.states import RolloutState
from app.db.engine import Database
from app.db.tables import DEFAULT_PROJECT, Event, Job, Rollout
from benchmarks.harness import report
from benchmarks.harness.polling import KEY
from benchmarks.harness.processes import ROOT, cpu_seconds, process, read_line, running, wait_until
from deploy.local.ports import free_port
from tests import broker, postgres
from tests.tiny import make_weightless_llama

MODEL = "tiny"
START_S = 60.0
FULL_JOBS, ROLLOUTS, EVENTS = 20, 2000, 300
# The tests' server forgets to sync; here it does what a server is for.
DURABLE = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on", "autovacuum": "on"}
DOORS = {"rung": ("-m", "app.cli.main", "worker"), "polled": ("-m", "workers.local")}
MILESTONES = {"read": "Files validated%", "claimed": "Fine-tuning job started%"}


@dataclass(frozen=True)
class Api:
    """A running `hone api`. `server`: the process of its database server, 0 where there is none."""

    name: str
    url: str
    key: str
    data: Path
    environment: dict[str, str]
    database: str
    process: int
    server: int

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key, timeout=60, max_retries=0)


@contextmanager
def durable_postgres() -> Iterator[postgres.Server]:
    with postgres.server(own=True) as server:
        with psycopg.connect(server.url.render_as_string(hide_password=False), autocommit=True) as connection:
            for name, value in DURABLE.items():
                connection.execute(f"ALTER SYSTEM SET {name} = '{value}'")
            connection.execute("SELECT pg_reload_conf()")
            time.sleep(0.5)
            shown = {name: connection.execute(f"SHOW {name}").fetchone() for name in DURABLE}
        assert all(found == (DURABLE[name],) for name, found in shown.items()), shown
        yield server


def postmaster(server: postgres.Server) -> int:
    return int((server.engine.pgdata / "postmaster.pid").read_text().splitlines()[0])


@contextmanager
def serve(name: str, root: Path, redis_url: str, database: str | None, server: int = 0) -> Iterator[Api]:
    data, port = root / "data", free_port()
    data.mkdir(parents=True)
    make_weightless_llama(data / "models" / MODEL)
    environment = {
        "HONE_DATA_DIR": str(data),
        "HONE_PORT": str(port),
        "HONE_REDIS_URL": redis_url,
        "HONE_RATE_LIMIT_PER_MINUTE": "0",
        **({"HONE_DATABASE_URL": database} if database else {}),
    }
    with process(["-m", "app.cli.main", "api"], log=root / "api.log", environment=environment) as child:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: _answers(f"{url}/livez"), START_S, f"the API on {name}")
        key = subprocess.run(
            [sys.executable, "-m", "app.cli.main", "keys", "create", "bench"],
            cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=True,
        ).stdout.strip()  # fmt: skip
        yield Api(name, url, key, data, environment, database or f"sqlite:///{data / 'hone.db'}", child.pid, server)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


# --- create to claim --------------------------------------------------------------------------------------------------


def claims(api: Api, door: str, count: int) -> dict[str, list[float]]:
    """Seconds from the call of the client to each milestone, of `count` jobs one after the other."""
    rng, client = random.Random(0), api.client
    files = [client.files.create(file=(f"{n}.jsonl", _rows(n)), purpose="fine-tune").id for n in (12, 6)]
    found: dict[str, list[float]] = {"answered": [], **{name: [] for name in MILESTONES}}
    mark = f"HONE_DATA_DIR={api.data}"
    with process(DOORS[door], log=api.data.parent / f"{door}.log", environment=api.environment):
        wait_until(lambda: _answers(f"{api.url}/healthz"), START_S, f"the worker that is {door}")
        for number in range(count + 1):  # the first one warms up
            time.sleep(rng.uniform(0.5, 1.5))  # or jobs would keep step with what looks twice a second
            asked = time.time()
            job = client.fine_tuning.jobs.create(
                model=MODEL, training_file=files[0], validation_file=files[1],
                method={"type": "reinforcement", "reinforcement": {"grader": _grader()}},  # type: ignore[arg-type]
            )  # fmt: skip
            answered = time.time()
            at = asyncio.run(_milestones(api, job.id))
            client.fine_tuning.jobs.cancel(job.id)
            wait_until(lambda: not running("workers.supervisor", mark), START_S, "the end of a cancelled supervisor")
            if number:
                found["answered"].append(answered - asked)
                for name, moment in at.items():
                    found[name].append(moment - asked)
    return found


async def _milestones(api: Api, job_id: str) -> dict[str, float]:
    """When each was written, once all are there. Raises DidNotStart."""
    database, deadline = Database(api.database), time.monotonic() + START_S
    try:
        while True:
            async with database.read() as session:
                at = {
                    name: await session.scalar(
                        select(Event.created_at).where(Event.job_id == job_id, Event.message.like(text))
                    )
                    for name, text in MILESTONES.items()
                }
            known = {name: moment for name, moment in at.items() if moment is not None}
            if len(known) == len(MILESTONES):
                return known
            if time.monotonic() > deadline:
                raise TimeoutError(f"{job_id} was not claimed within {START_S:.0f} s: {known}")
            await asyncio.sleep(0.05)
    finally:
        await database.close()


def _rows(count: int) -> bytes:
    rows = ({"messages": [{"role": "user", "content": f"Say {n}"}], "answer": str(n)} for n in range(count))
    return "\n".join(map(json.dumps, rows)).encode()


def _grader() -> dict[str, str]:
    texts = {"input": "{{sample.output_text}}", "reference": "{{item.answer}}"}
    return {"type": "string_check", "name": "exact", "operation": "eq", **texts}


# --- polling ----------------------------------------------------------------------------------------------------------


async def fill(api: Api) -> list[str]:
    """Jobs as they are in the middle of a long run; their ids. No worker is there to take them for dead."""
    database, at = Database(api.database), time.time()
    jobs = [f"ftjob-bench{number:03}" for number in range(FULL_JOBS)]
    states = (RolloutState.TRAINED, RolloutState.NO_SIGNAL, RolloutState.TOOL_FAILED, RolloutState.EVALUATED)
    try:
        for job in jobs:
            common = {"project_id": DEFAULT_PROJECT, "job_id": job}
            metrics = {"step": 1, "train_mean_reward": 0.5, "seconds": {"sampling": 3.25, "training": 1.5}} | {
                f"metric_{n}": n / 7 for n in range(30)
            }
            async with database.begin() as session:
                session.add(
                    Job(
                        id=job, project_id=DEFAULT_PROJECT, status="running", attempt=1, model=MODEL, seed=7,
                        training_file="file-a", validation_file="file-b", created_at=at, started_at=at,
                        lease_owner="bench", lease_until=at + 1e6, step=40, total_steps=100, options={},
                        activity="sampling", activity_at=at,
                        method={"type": "reinforcement", "reinforcement": {"grader": _grader(), "hyperparameters": {}}},
                    )
                )  # fmt: skip
                await session.flush()
                rollouts = [
                    common | {
                        "id": f"trace_{job}_{n}", "attempt": 1, "step": n // 50, "split": "train", "row": n % 50,
                        "group": n // 8, "sample": n % 8, "version": n // 50, "state": states[n % len(states)].value,
                        "started_at": at, "finished_at": at,
                    }
                    for n in range(ROLLOUTS)
                ]  # fmt: skip
                events = [
                    common | {
                        "id": f"ftevent-{job}-{n}", "created_at": at + n, "level": "info", "type": "metrics",
                        "message": f"Step {n}/{EVENTS}: training reward 0.5", "data": metrics,
                    }
                    for n in range(EVENTS)
                ]  # fmt: skip
                await session.execute(insert(Rollout), rollouts)
                await session.execute(insert(Event), events)
    finally:
        await database.close()
    return jobs


@dataclass(frozen=True)
class Polled:
    """One phase: requests a second, their times in seconds, and the cores that each party used."""

    rate: float
    seconds: list[float]
    cores: dict[str, float]


def poll(api: Api, jobs: Sequence[str], options: argparse.Namespace, pause_s: float) -> Polled:
    command = [
        sys.executable, "-m", "benchmarks.harness.polling", "--url", api.url, "--jobs", ",".join(jobs),
        "--clients", str(options.clients // options.processes), "--pause", str(pause_s),
        "--warm-up", str(options.warm_up), "--seconds", str(options.seconds),
    ]  # fmt: skip
    environment = {**os.environ, KEY: api.key}
    children = [
        subprocess.Popen([*command, "--seed", str(seed)], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
        for seed in range(options.processes)
    ]
    try:
        for child in children:
            read_line(child.stdout, START_S)
        before = _used(api)
        time.sleep(options.seconds)
        after = _used(api)
        said = [child.communicate(timeout=START_S)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    if any(child.returncode for child in children):
        raise RuntimeError(f"a polling process failed; see {api.data.parent / 'api.log'}")
    found: list[dict[str, Any]] = [json.loads(line) for line in said]
    seconds = [each for one in found for each in one["seconds"]]
    used = {name: after[name] - before[name] for name in before} | {"clients": sum(one["cpu_s"] for one in found)}
    return Polled(len(seconds) / options.seconds, seconds, {name: cpu / options.seconds for name, cpu in used.items()})


def _used(api: Api) -> dict[str, float]:
    """CPU seconds so far."""
    used = {"API": cpu_seconds(api.process)}
    return used | ({"PostgreSQL": cpu_seconds(api.server)} if api.server else {})


# --- what is printed --------------------------------------------------------------------------------------------------


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def _milliseconds(values: Sequence[float]) -> list[str]:
    return [f"{1000 * quantile(values, share):.0f}" for share in (0.5, 0.99)]


def show_claims(found: dict[tuple[str, str], dict[str, list[float]]]) -> None:
    rows = []
    for (name, door), times in found.items():
        columns = [cell for moment in ("answered", "read", "claimed") for cell in _milliseconds(times[moment])]
        rows.append([f"{name}, {door}", str(len(times["claimed"])), *columns])
    header = ["ms from the call", "jobs", "answered p50", "p99", "files read p50", "p99", "claimed p50", "p99"]
    report.say(report.table(header, rows))


def show_polls(title: str, found: dict[str, list[Polled]]) -> dict[str, float]:
    """Requests a second by database, medians of the rounds."""
    rows, rates = [], {}
    for name, rounds in found.items():
        rates[name] = report.median([one.rate for one in rounds])
        times = [each for one in rounds for each in one.seconds]
        cores = ", ".join(f"{who} {report.median([one.cores[who] for one in rounds]):.2f}" for who in rounds[0].cores)
        each = " ".join(f"{one.rate:.0f}" for one in rounds)
        rows.append([name, f"{rates[name]:.0f}", each, *_milliseconds(times), cores])
    report.say(report.table([title, "requests/s", "rounds", "p50 ms", "p99 ms", "cores used"], rows))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--processes", type=int, default=4, help="that the clients run in")
    parser.add_argument("--pause", type=float, default=5.0, help="seconds between two polls of a client, second phase")
    parser.add_argument("--warm-up", type=float, default=3.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=20, help="claims for each door and database; 0: none")
    options = parser.parse_args()
    report.begin("service")
    with (
        tempfile.TemporaryDirectory(prefix="hone-bench-") as scratch,
        durable_postgres() as server,
        broker.broker_running() as redis,
        serve("SQLite", Path(scratch) / "sqlite", redis.url, None) as lite,
        serve(
            "PostgreSQL", Path(scratch) / "postgres", redis.url, server.create_database(), postmaster(server)
        ) as real,
    ):
        sides = (lite, real)
        if options.jobs:
            waited = {}
            for door in DOORS:
                for api in sides:
                    redis.clear()
                    waited[(api.name, door)] = claims(api, door, options.jobs)
            show_claims(waited)
        jobs = {api.name: asyncio.run(fill(api)) for api in sides}
        full: dict[str, list[Polled]] = {api.name: [] for api in sides}
        paced: dict[str, list[Polled]] = {api.name: [] for api in sides}
        for _ in range(options.rounds):
            for api in sides:
                full[api.name].append(poll(api, jobs[api.name], options, 0.0))
                paced[api.name].append(poll(api, jobs[api.name], options, options.pause))
        rates = show_polls(f"{options.clients} clients, no pause", full)
        show_polls(f"{options.clients} clients, a poll each {options.pause:g} s", paced)
    report.end(rates["PostgreSQL"] / rates["SQLite"])


if __name__ == "__main__":
    main()
