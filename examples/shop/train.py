"""Train the shop agent with the `openai` client and show what it learned, measured from outside on held-out questions.

    export OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=… SHOP_URL=http://127.0.0.1:9000
    python -m examples.shop.train

Does not cover: starting the service and `examples.shop.server`; `hone demo` does all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

from examples.shop.agent import Agent, Measured, Shop
from examples.shop.data import Task, jsonl, shop_task
from examples.shop.report import Both, compare, conversations, table
from examples.shop.view import Frame, View, open_view

SAMPLES = 2  # sampled episodes per held-out row, here and in the job's validation
POLL_S = 1.0
FINISHED = ("succeeded", "failed", "cancelled", "paused")  # a paused job waits for a person


def create_job(client: OpenAI, shop: Shop, task: Task, model: str, seed: int) -> FineTuningJob:
    """Both files, one job: 8 steps of 8 questions, 8 rollouts each.

    Strictly on-policy: in eight steps each counts, and on a CPU sampling ahead takes the trainer's cores.
    """
    files = [
        client.files.create(file=(f"{task.name}-{name}.jsonl", jsonl(rows)), purpose="fine-tune").id
        for name, rows in (("train", task.train), ("valid", task.valid))
    ]
    lookup = {"name": "lookup", "server_url": f"{shop.url}/tools/lookup", "headers": shop.headers}
    reinforcement: dict[str, Any] = {
        "tools": [lookup],
        "grader": {"type": "endpoint", "name": "shop", "url": f"{shop.url}/grade", "headers": shop.headers},
        "max_episode_steps": task.max_steps,
        "hyperparameters": {
            "batch_size": 8,
            "compute_multiplier": 1,
            "n_epochs": 1,
            "eval_interval": 4,
            "eval_samples": SAMPLES,
        },
    }
    return client.fine_tuning.jobs.create(
        model=model,
        training_file=files[0],
        validation_file=files[1],
        seed=seed,
        suffix=task.name,
        method={"type": "reinforcement", "reinforcement": reinforcement},  # type: ignore[arg-type]  # tools: not typed there
        extra_body={"hone": {"max_tokens_per_turn": task.max_tokens, "max_trained_rollouts": 32, "max_staleness": 0}},
    )


def follow(client: OpenAI, job_id: str, view: View, timeout_s: float) -> tuple[FineTuningJob, list[FineTuningJobEvent]]:
    """Show the job until it ends; returns it with all its events, oldest first."""
    begun, seen = time.monotonic(), list[FineTuningJobEvent]()
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        fresh = new_events(client, job_id, {event.id for event in seen})
        seen += fresh
        view.show(frame(job, seen, [event.message for event in fresh], time.monotonic() - begun))
        if job.status in FINISHED:
            return job, seen
        if time.monotonic() - begun > timeout_s:
            raise TimeoutError(f"{job_id} is still {job.status} after {timeout_s:.0f} s")
        time.sleep(POLL_S)


def new_events(client: OpenAI, job_id: str, known: set[str]) -> list[FineTuningJobEvent]:
    """Events come newest first: read until a known one."""

    def unknown() -> Iterator[FineTuningJobEvent]:
        for event in client.fine_tuning.jobs.list_events(job_id, limit=50):
            if event.id in known:
                return
            yield event

    return list(unknown())[::-1]


def frame(job: FineTuningJob, events: list[FineTuningJobEvent], fresh: list[str], seconds: float) -> Frame:
    hone: dict[str, Any] = getattr(job, "hone", None) or {}
    metrics = [data_of(event) for event in events if event.type == "metrics"]
    by_step = {data.get("step"): data for data in metrics if data.get("train_mean_reward") is not None}
    activity = hone.get("activity") or {}
    return Frame(
        job_id=job.id,
        status=job.status,
        step=hone.get("step") or 0,
        total_steps=hone.get("total_steps") or 0,
        rewards=[data["train_mean_reward"] for data in by_step.values()],
        tool_calls=[data["tool_calls_mean"] for data in by_step.values() if data.get("tool_calls_mean") is not None],
        valid_rewards=[data["valid"]["sampled"]["reward_mean"] for data in metrics if data.get("valid")],
        activity=activity.get("text") or hone.get("queue_reason") or "",
        activity_age_s=activity.get("age_s") or 0.0,
        ledger=(hone.get("rollouts") or {}).get("states") or {},
        seconds=seconds,
        events=fresh,
    )


def data_of(event: FineTuningJobEvent) -> dict[str, Any]:
    return event.data if isinstance(event.data, dict) else {}


def measure(agent: Agent, view: View, label: str, seed: int) -> Both:
    """Two sampled episodes and one greedy episode for each held-out question."""

    def run(name: str, samples: int, temperature: float) -> Measured:
        return agent.measure(samples, temperature, seed, partial(view.count, f"{label}, {name}"))

    return Both(sampled=run("sampled", SAMPLES, 1.0), greedy=run("greedy", 1, 0.0))


def main(make_task: Callable[[int], Task] = shop_task) -> int:
    """Exit code 0: trained and measured; 1: the job failed, and why is on the screen."""
    parser = argparse.ArgumentParser(description="Train an agent of the shop and measure it before and after.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--report", type=Path, help="write the numbers to this JSON file")
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds the job may take")
    options = parser.parse_args()

    client = OpenAI()  # OPENAI_BASE_URL, OPENAI_API_KEY
    shop = Shop(os.environ["SHOP_URL"].rstrip("/"), os.environ.get("SHOP_TOKEN", "shop-secret"))
    task = make_task(options.seed)

    print(f"1. The base model, {options.model}, on {len(task.valid)} held-out questions", flush=True)
    with open_view() as view:
        before = measure(Agent(client, shop, task, options.model), view, "before", options.seed)
    print("2. The job", flush=True)
    with open_view() as view:
        created = create_job(client, shop, task, options.model, options.seed)
        job, events = follow(client, created.id, view, options.timeout)
    if job.status != "succeeded" or job.fine_tuned_model is None:
        errors = [event.message for event in events if event.level == "error"]
        print(f"job {job.id} {job.status}: {job.error.message if job.error else events[-1].message}", file=sys.stderr)
        print(f"last error event: {errors[-1] if errors else 'none'}", file=sys.stderr)
        return 1
    print(f"3. The tuned model, {job.fine_tuned_model}, on the same questions", flush=True)
    with open_view() as view:
        after = measure(Agent(client, shop, task, job.fine_tuned_model), view, "after", options.seed)

    print("\n" + table(before, after) + "\n")
    passes = [data["valid"]["sampled"] for data in map(data_of, events) if data.get("valid")]
    first, last = (passes[0], passes[-1]) if passes else (None, None)
    verdicts = [compare("before", before.sampled, first), compare("after", after.sampled, last)]
    print("The same questions in the job's own validation:")
    print("\n".join(line for _, line in verdicts) + "\n")
    print(conversations(before, after) + "\n")
    if options.report:
        hone: dict[str, Any] = getattr(job, "hone", None) or {}
        report = {
            "task": task.name,
            "seed": options.seed,
            "model": options.model,
            "fine_tuned_model": job.fine_tuned_model,
            "baseline": before.as_dict(),
            "final": after.as_dict(),
            "validation": {"baseline": first, "final": last, "agrees": [agrees for agrees, _ in verdicts]},
            "seconds": hone.get("seconds") or {},
            "rollouts": hone.get("rollouts") or {},
        }
        options.report.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
