"""From the end of an optimizer step to the first token of the new policy; ratio = full-weight reload / ours.

    python -m benchmarks.bench_publish [--model tiny|smollm2] [--steps 6] [--engine builtin|vllm]

Ours: the phases of a real job on `hone up` (strictly on-policy, tools that answer at once), medians over its steps: the
trainer scores the canary, writes the adapter, takes its snapshot; the supervisor checks the files, loads them into the
sampler, waits for it to be quiet and proves the version; then one token is asked for. Beside it, on the same host:
  reload   the adapter is merged, all weights are saved, a fresh engine loads them and gives its first token: what is
           left without adapters in the engine
  sync     the adapter is merged into the trainer's weights, all of them are copied once within the process, and it is
           taken out again: the least that a TRL-style weight sync does, without the transfer, the proof and a resume
Does not cover: several samplers, several GPUs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from app.models.catalogue import BaseModel, read_card
from app.samplers.client import CompletionRequest
from benchmarks.harness import adapters, agent_task, ledger, report, sampler_server, taught_model
from benchmarks.harness.processes import tool_server
from benchmarks.harness.service import JobSpec, service

RANK = 8
PROMPT = list(range(20, 320))
TRAINER = ("canary", "publication", "snapshot")


async def first_token_s(url: str, model: str, tokens: int = len(PROMPT)) -> float:
    """Seconds of a request for one token behind a prompt of `tokens` tokens."""
    async with sampler_server.client(url) as sampler:
        began = time.perf_counter()
        await sampler.complete(CompletionRequest(model=model, prompt_ids=PROMPT[:tokens], max_tokens=1, timeout_s=120))
        return time.perf_counter() - began


def ours(model: BaseModel, options: argparse.Namespace, scratch: Path) -> dict[str, float]:
    """Seconds by phase, medians over the job's steps; `first token` is measured on the job's sampler."""
    settings = {
        "sampler_engine": options.engine,
        "sampler_dtype": options.dtype,
        "trainer_dtype": options.dtype,
        "threads": str(options.threads),
    }
    if options.engine == "vllm":
        settings["vllm_python"] = os.environ[sampler_server.VLLM_PYTHON]
    rows = agent_task.rows(options.steps * 4, worked_examples=0 if options.model == "tiny" else 1)
    with (
        tool_server(0, 0, scratch / "tools.log") as tool_url,
        service(scratch, [model], tool_url, **settings) as running,
    ):
        spec = JobSpec(
            model=model.id, train=rows, valid=rows[:1], steps=options.steps, batch=4, group=4,
            max_episode_steps=agent_task.TURNS + 1, tool_url=tool_url, tools=agent_task.NAMES,
            hone={"max_tokens_per_turn": 96, "lora_rank": RANK, "learning_rate": 1e-4, "max_staleness": 0},
        )  # fmt: skip
        job = running.create(spec)
        running.wait([job], 3600)
        steps = [step for step in ledger.step_events(running.database, job) if "publication" in step]
        with closing(sqlite3.connect(running.database)) as db:
            url = db.execute("SELECT url FROM samplers ORDER BY heartbeat DESC").fetchone()[0]
        phases = [_phases(step) for step in steps]
        found = {name: report.median([phase.get(name, 0.0) for phase in phases]) for name in phases[0]}
        found["first token"] = report.median([asyncio.run(first_token_s(url, model.id, 300 - n)) for n in range(5)])
    return found


def _phases(step: Mapping[str, Any]) -> dict[str, float]:
    trainer = {f"trainer: {name}": float(step["update_seconds"].get(name, 0.0)) for name in TRAINER}
    seconds = step["publication"]["seconds"]
    served = {f"sampler: {name}": float(value) for name, value in seconds.items() if name != "total"}
    # What the sum of the phases leaves out: waiting for the loop, retries.
    served["sampler: rest"] = max(0.0, float(seconds["total"]) - sum(served.values()))
    return {**trainer, **served}


def reload(model: BaseModel, options: argparse.Namespace, scratch: Path) -> dict[str, float]:
    """Seconds of merging, saving, starting an engine on the result, and its first token."""
    policy = adapters.random_policy(model, options.dtype, RANK)
    began = time.perf_counter()
    merged = policy.merge_and_unload()
    target = scratch / "merged" / model.id
    saved_from = time.perf_counter()
    merged.save_pretrained(target)
    for source in model.path.iterdir():
        if not (target / source.name).exists() and source.suffix != ".safetensors":
            shutil.copy2(source, target / source.name)
    saved = time.perf_counter()
    del merged, policy
    place = scratch / "reload"
    place.mkdir()
    with sampler_server.sampler(
        options.engine, read_card(target), place, dtype=options.dtype, threads=options.threads, length=2048
    ) as (url, seconds):
        first = asyncio.run(first_token_s(url, model.id))
    return {"merge": saved_from - began, "save": saved - saved_from, "start engine": seconds, "first token": first}


def sync(model: BaseModel, options: argparse.Namespace) -> float:
    """Seconds of merge, one copy of every weight, and unmerge."""
    policy = adapters.random_policy(model, options.dtype, RANK)
    target = [torch.empty_like(parameter) for parameter in policy.get_base_model().parameters()]
    spans = []
    for _ in range(3):
        began = time.perf_counter()
        policy.merge_adapter()
        with torch.no_grad():
            for copy, parameter in zip(target, policy.get_base_model().parameters(), strict=True):
                copy.copy_(parameter)
        policy.unmerge_adapter()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spans.append(time.perf_counter() - began)
    return report.median(spans)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--engine", choices=("builtin", "vllm"), default="builtin")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    report.begin("bench_publish")
    model = taught_model.taught() if options.model == "tiny" else taught_model.installed()
    with tempfile.TemporaryDirectory(prefix="hone-bench-") as name:
        scratch = Path(name)
        mine = ours(model, options, scratch)
        baseline = reload(model, options, scratch)
        least = sync(model, options)
    for label, phases in ((f"Hone, {options.engine}", mine), ("reload", baseline)):
        report.say(f"\n{label}: {sum(phases.values()):.3f} s")
        report.say(report.table(["phase", "s"], [[name, f"{value:.3f}"] for name, value in phases.items()]))
    report.say(f"\nsync within one process (no transfer, no proof, no snapshot): {least:.3f} s")
    report.end(sum(baseline.values()) / sum(mine.values()))


if __name__ == "__main__":
    main()
