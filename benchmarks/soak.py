"""Soak: two jobs on one sampler, long rows, many publications; does memory, adapter slots or files grow?

    python -m benchmarks.soak [--publications 200] [--row-tokens 8000]

The tiny taught model calls its tools, whose replies are long pages; small steps, so that publications come fast.
Watched every few seconds: resident memory of every process of the installation, adapter versions held by samplers,
files and directories in the data directory (traces and checkpoints apart: they are meant to stay). The verdict compares
the second quarter of the run with the last. ratio = the largest of these quotients; above 1.1 is `grows`.
Does not cover: speed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from app.models.catalogue import BaseModel
from benchmarks.harness import agent_task, ledger, report, taught_model
from benchmarks.harness.processes import resident_mib, running, tool_server
from benchmarks.harness.service import JobSpec, Service, service

KINDS = {
    "sampler MiB": "workers.sampler.builtin",
    "supervisors MiB": "workers.supervisor",
    "trainers MiB": "workers.trainer",
    "API MiB": "app.cli.main",
    "keeper MiB": "workers.sampler.keeper",
    "runner MiB": "workers.local",
}
KEPT = ("traces", "checkpoints")  # grow by design, and are bounded by retention
EVERY_S = 3.0
JOBS = 2
GROWS = 1.1
SMALL = {"MiB": 24.0, "": 4.0}  # differences below these are noise


@dataclass(frozen=True)
class Look:
    """One look at the installation. `figures` by name."""

    publications: int
    figures: dict[str, float]


def look(service: Service, jobs: Sequence[str]) -> Look:
    mark = f"HONE_DATA_DIR={service.data}"
    figures = {name: sum(map(resident_mib, running(needle, mark))) for name, needle in KINDS.items()}
    files, directories = _count(service.data, KEPT)
    figures |= {"adapter slots": ledger.loaded_adapters(service.database), "files": files, "directories": directories}
    figures["kept files"] = sum(_count(service.data / name, ())[0] for name in KEPT)
    return Look(sum(len(ledger.step_events(service.database, job)) for job in jobs), figures)


def _count(root: Path, without: Sequence[str]) -> tuple[int, int]:
    files = directories = 0
    for place, names, found in os.walk(root):
        if Path(place) == root:
            names[:] = [name for name in names if name not in without]
        directories += len(names)
        files += len(found)
    return files, directories


def verdict(looks: Sequence[Look], name: str) -> tuple[float, bool]:
    """Last quarter over second quarter by means, and whether that is growth."""
    values = [one.figures[name] for one in looks]
    quarter = max(1, len(values) // 4)
    early, late = values[quarter : 2 * quarter] or values[:1], values[-quarter:]
    before, after = sum(early) / len(early), sum(late) / len(late)
    if before == 0:
        return 1.0, after > 0
    small = SMALL["MiB" if name.endswith("MiB") else ""]
    return after / before, after / before > GROWS and after - before > small


def run(options: argparse.Namespace, model: BaseModel, scratch: Path) -> list[Look]:
    looks: list[Look] = []
    steps = -(-options.publications // JOBS)
    words = max(0, (options.row_tokens - 400) // 2) * 10 // 24  # two replies in the first turn; 2.4 tokens a word
    rows = [{**row, "reply_words": words} for row in agent_task.rows(steps, worked_examples=0)]
    settings = {
        "sampler_dtype": "float32",
        "trainer_dtype": "float32",
        "threads": str(options.threads),
        "runner_slots": str(JOBS),
        "sampler_max_model_len": str(model.context),
        "sampler_max_adapters": "8",
    }
    with (
        tool_server(0, 0, scratch / "tools.log") as tool_url,
        service(scratch, [model], tool_url, **settings) as running,
    ):
        spec = JobSpec(
            model=model.id, train=rows, valid=[{**rows[0], "reply_words": 0}], steps=steps, batch=1, group=2,
            max_episode_steps=2, tool_url=tool_url, tools=agent_task.NAMES,
            hone={
                "max_tokens_per_turn": 64, "lora_rank": 4, "learning_rate": 1e-5, "on_no_signal": "continue",
                "max_sequence_tv": "off", "importance_range": "off",
                "max_trained_rollouts": 1,  # half the CPU time of a publication, and memory needs no second row
            },
        )  # fmt: skip
        jobs = [running.create(spec) for _ in range(JOBS)]
        last = time.monotonic()

        def watch() -> None:
            nonlocal last
            if time.monotonic() - last < EVERY_S:
                return
            last = time.monotonic()
            looks.append(look(running, jobs))
            if len(looks) % 10 == 0:
                report.say(f"{looks[-1].publications} publications: {_shown(looks[-1])}")

        running.wait(jobs, options.limit_s, watch)
        found = [ledger.training(running.database, job) for job in jobs]
        trained = [step.get("policy", {}).get("raw_tokens", 0) for one in found for step in one.steps]
        report.say(
            f"{sum(len(one.steps) for one in found)} publications, {sum(one.rollouts for one in found)} rollouts, "
            f"rows of {sum(trained) / max(1, sum(sum(one.states.values()) for one in found)):.0f} tokens, states "
            f"{[one.states for one in found]}"
        )
    return looks


def _shown(one: Look) -> str:
    return ", ".join(f"{name} {value:.0f}" for name, value in one.figures.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publications", type=int, default=200, help="over both jobs")
    parser.add_argument("--row-tokens", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=7200)
    options = parser.parse_args()
    report.begin("soak")
    model = taught_model.taught_long(2 * max(4096, options.row_tokens))
    with tempfile.TemporaryDirectory(prefix="hone-bench-") as scratch:
        looks = run(options, model, Path(scratch))
    looks = [one for one in looks if one.publications]
    middle = looks[len(looks) // 2]
    rows, worst = [], 1.0
    for name in looks[0].figures:
        quotient, grows = verdict(looks, name)
        kept = name == "kept files"
        worst = worst if kept else max(worst, quotient if grows else min(quotient, GROWS))
        said = "by design" if kept else "GROWS" if grows else "flat"
        rows.append(
            [name, *(f"{one.figures[name]:.0f}" for one in (looks[0], middle, looks[-1])), f"{quotient:.2f}", said]
        )
    at = [f"at {one.publications}" for one in (looks[0], middle, looks[-1])]
    report.say(report.table(["", *at, "last/second quarter", "verdict"], rows))
    report.say("verdict: " + ("grows" if any(row[-1] == "GROWS" for row in rows) else "flat"))
    report.end(worst)


if __name__ == "__main__":
    main()
