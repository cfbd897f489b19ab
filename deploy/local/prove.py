"""`python -m deploy.local.prove`: jobs of a tiny model outlive kill -9 of their workers and a Redis that forgets all.

Does not cover: faults at random and in numbers (tests/chaos). Here the whole service is real, as a user starts it, and
three things happen to it: a worker's machine dies, Redis comes back empty, a Celery process dies.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from deploy.local.__main__ import say
from deploy.local.ports import HOST, free_port, taken
from deploy.local.processes import kill_all, left_of, running
from deploy.local.program import LOOK_S, Program, TopologyFailed
from deploy.local.proof_jobs import Jobs, ProofFailed, Sum, require
from deploy.local.topology import Options, Topology, lose_data

MODEL = "tiny-llama"
SMALL = {
    "HONE_SAMPLER_ENGINE": "builtin",
    "HONE_SAMPLER_DTYPE": "float32",
    "HONE_TRAINER_DTYPE": "float32",
    "HONE_THREADS": "1",
    "HONE_LEASE_SECONDS": "10",
}
OF_A_JOB = ("workers.supervisor", "workers.trainer")
END_S = 20.0  # for what belonged to a dead process: a leash gives it 15
T = TypeVar("T")


@dataclass(frozen=True)
class Figures:
    """What was done, and what came of it."""

    jobs: int
    seconds: float  # from the first create to the last end
    kills: int
    processes: int  # that died with them
    sum: Sum

    def __str__(self) -> str:
        return (
            f"topology: {self.jobs} jobs succeeded in {self.seconds:.0f} s; {self.kills} workers killed "
            f"({self.processes} processes), Redis lost its data once; {self.sum.resumed} resumed attempts, "
            f"{self.sum.checkpoints} checkpoints, {self.sum.rollouts} rollouts, 0 orphans"
        )


class Proof:
    """One run over a topology that is up."""

    def __init__(self, topology: Topology, jobs: Jobs, deadline: float) -> None:
        self.topology, self.jobs, self.deadline = topology, jobs, deadline
        self.killed = 0

    def run(self, count: int) -> Figures:
        began = time.monotonic()
        self.jobs.create(count)
        machine, celery = self.topology.workers[:2]
        victims = [self.kill_machine(machine)]
        self.empty_redis()
        victims.append(self.kill_celery(celery))
        self.until("all jobs have ended", lambda: None if self.jobs.unfinished() else True)
        seconds = time.monotonic() - began
        total = self.jobs.check()
        for job_id in victims:
            require(any(self.jobs.resumed_from(job_id)), f"{job_id} lost its worker and did not go on from a snapshot")
        self.until("the workers listen to Redis again", self.listening)
        self.nothing_runs_on()
        return Figures(count, seconds, len(victims), self.killed, total)

    def kill_machine(self, host: str) -> str:
        """kill -9 to all of a worker amid a job, as when its machine dies: nobody is left to put the job back."""
        job_id = self.until(f"{host} is amid a job", lambda: self.amid(host))
        killed = kill_all(self.topology.folder, host=host)
        require(killed > 1, f"{host} had {killed} processes")
        self.killed += killed
        say(f"killed {host}: {killed} processes, amid {job_id}")
        return job_id

    def kill_celery(self, host: str) -> str:
        """kill -9 to the Celery process alone: the supervisor sees its leash end, and puts the job back."""
        job_id = self.until(f"{host} is amid a job", lambda: self.amid(host))
        folder = self.topology.folder
        of_the_job = [pid for each in OF_A_JOB for pid in running(folder, each, host=host)]
        for pid in running(folder, "workers.tasks", host=host):
            os.kill(pid, signal.SIGKILL)
            self.killed += 1
        left = left_of(of_the_job, END_S)
        require(not left, f"the Celery worker of {host} died {END_S:g} s ago, and its job's processes {left} run on")
        say(f"killed the Celery process of {host}, amid {job_id}")
        return job_id

    def empty_redis(self) -> None:
        """kill -9 to Redis, and it comes back on its port with nothing in it."""
        redis, kept = self.topology.redis, self.topology.kept["redis"]
        assert redis is not None  # the proof starts its own
        require(any(redis.folder.iterdir()), "Redis keeps no file")
        waiting = len(self.jobs.unfinished())
        require(waiting, "every job had ended before Redis lost its data")
        kept.kill()
        lose_data(redis)
        kept.start()
        kept.await_health()
        say(f"Redis came back empty, with {waiting} jobs to do")

    def amid(self, host: str) -> str | None:
        """The job that `host` runs, once it has a snapshot to go on from and a step yet to come."""
        unfinished = {job.id: job for job in self.jobs.unfinished()}
        require(unfinished, f"every job had ended before {host} was amid one")
        lines = running(self.topology.folder, "workers.supervisor", host=host).values()
        for job_id, job in unfinished.items():
            if any(job_id in line for line in lines) and 1 <= job.hone["step"] < self.jobs.steps[job_id]:
                return str(job_id)
        return None

    def listening(self) -> bool | None:
        import redis

        assert self.topology.redis is not None
        with redis.Redis.from_url(self.topology.redis.url, socket_timeout=2) as client:
            clients: Any = client.client_list()
        waiting = [each for each in clients if each["cmd"] == "brpop"]
        return True if len(waiting) >= len(self.topology.workers) else None

    def nothing_runs_on(self) -> None:
        """Supervisors and trainers end with their jobs."""
        folder = self.topology.folder
        left = left_of([pid for each in OF_A_JOB for pid in running(folder, each)], END_S)
        require(not left, f"all jobs have ended, and the processes {left} run on")

    def until(self, what: str, found: Callable[[], T | None]) -> T:
        """What `found` returns once it is not None. Raises ProofFailed at the deadline."""
        while (value := found()) is None:
            if time.monotonic() >= self.deadline:
                states = [f"{job.id} {job.status} step {job.hone['step']}" for job in self.jobs.all()]
                raise ProofFailed(f"the deadline passed before {what}: {', '.join(states)}")
            self.topology.look()
            time.sleep(LOOK_S)
        return value


def prove(models: Path, folder: Path, count: int, deadline_s: float) -> Figures:
    """Bring everything up in `folder`, with the models of `models`. Raises TopologyFailed; nothing is left running."""
    deadline = time.monotonic() + deadline_s
    agent = free_port()
    environment = {**SMALL, "HONE_EGRESS_ALLOW": f"{HOST}:{agent}"}
    shutil.copytree(models, folder / "models")
    with Topology(Options(folder, port=0, environment=environment), say) as topology:
        serve = (sys.executable, "-m", "tests.e2e.agent_server", str(agent))
        topology.start([Program("agent", serve, lambda: None if taken(agent) else "does not listen", trusted=False)])
        jobs = Jobs(topology.base_url, topology.key(), MODEL, f"http://{HOST}:{agent}")
        figures = Proof(topology, jobs, deadline).run(count)
    left = running(folder)
    require(not left, f"the topology has ended, and these run on: {left}")
    servers = [store.port for store in topology.stores]
    open_ports = [port for port in (topology.port, agent, *servers) if taken(port)]
    require(not open_ports, f"the topology has ended, and somebody listens on {open_ports}")
    return figures


def teach_model(models: Path) -> None:
    """A tiny model that mostly calls its tool, made in seconds."""
    from tests.e2e.teach import teach
    from tests.tiny import make_tiny_llama

    teach(make_tiny_llama(models / MODEL))


def leave(number: int, frame: FrameType | None) -> None:
    """Ends all in order; what was not proved to its end is not proved."""
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.local.prove", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--deadline", type=float, default=1500.0, help="seconds for all of it (%(default)g)")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    root = Path(tempfile.mkdtemp(prefix="hone-topology-"))
    root.chmod(0o711)  # root's PostgreSQL runs as another user
    try:
        teach_model(root / "models")
        figures = prove(root / "models", root / "data", options.jobs, options.deadline)
    except TopologyFailed as failed:
        sys.stderr.write(f"failed: {failed.message}\nlogs: {root / 'data' / 'logs'}\n")
        return 1
    shutil.rmtree(root)
    sys.stdout.write(f"{figures}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
