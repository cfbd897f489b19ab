"""Slow tools: the same agent job here and in TRL's own `GRPOTrainer` with tools; ratio = TRL's wall time / ours.

    python -m benchmarks.bench_slow_tools [--model tiny|smollm2] [--repeats 3] [--steps 4]

Both sides: same model directory, dtype, LoRA, rows, rollouts and updates, token bounds, threads and tool server, whose
n-th call waits the n-th latency of one lognormal sequence (mean 1 s, p99 10 s). Start-up and loading are outside of
both times; validation is one row here and none there. Ours runs once more with tools that answer at once: tokens per
second with slow tools as a share of that. TRL's tools are coroutines, its fastest kind (`harness.trl_agent` says why).
Does not cover: quality. Mean rewards are printed so that one can see that both do the same work.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from app.models.catalogue import BaseModel
from benchmarks.harness import agent_task, ledger, report, taught_model
from benchmarks.harness.processes import process, tool_server
from benchmarks.harness.service import JobSpec, Service, service
from benchmarks.harness.trl_spec import Result, Spec

LIMIT_S = 7200.0


@dataclass(frozen=True)
class Case:
    """What differs between the two models. `micro`: TRL's rows a forward pass, the largest that fits in memory."""

    model: BaseModel
    worked_examples: int
    dtype: str
    micro: int


def case(options: argparse.Namespace) -> Case:
    if options.model == "tiny":
        return Case(taught_model.taught(), 0, options.dtype or "float32", options.batch * options.group)
    return Case(taught_model.installed(), 2, options.dtype or "bfloat16", options.group)


def ours(running: Service, chosen: Case, options: argparse.Namespace, tool_url: str, seed: int) -> ledger.Training:
    spec = JobSpec(
        model=chosen.model.id,
        train=_rows(chosen, options),
        valid=_rows(chosen, options)[:1],
        steps=options.steps,
        batch=options.batch,
        group=options.group,
        max_episode_steps=agent_task.TURNS + 1,
        tool_url=tool_url,
        tools=agent_task.NAMES,
        hone={
            "max_tokens_per_turn": options.max_tokens,
            "max_tokens_per_episode": options.max_tokens,
            "learning_rate": options.learning_rate,
            "lora_rank": options.lora_rank,
            "on_no_signal": "continue",  # as TRL does
            **json.loads(options.hone),
        },
        seed=seed,
    )
    job_id = running.create(spec)
    running.wait([job_id], LIMIT_S)
    return ledger.training(running.database, job_id)


def theirs(chosen: Case, options: argparse.Namespace, tool_url: str, seed: int, scratch: Path) -> Result:
    spec = Spec(
        model=str(chosen.model.path),
        rows=_rows(chosen, options),
        steps=options.steps,
        batch=options.batch,
        group=options.group,
        micro=chosen.micro,
        turns=agent_task.TURNS + 1,
        max_tokens=options.max_tokens,
        learning_rate=options.learning_rate,
        lora_rank=options.lora_rank,
        lora_targets=list(chosen.model.lora_targets),
        dtype=chosen.dtype,
        threads=options.threads,
        tool_url=tool_url,
        seed=seed,
    )
    asked, answered, log = scratch / f"spec-{seed}.json", scratch / f"result-{seed}.json", scratch / "trl.log"
    asked.write_text(json.dumps(asdict(spec)))
    with process(["-m", "benchmarks.harness.trl_agent", str(asked), str(answered)], log=log) as child:
        code = child.wait(LIMIT_S)
    if code:
        raise RuntimeError(f"TRL's side ended with {code}:\n{log.read_text(errors='replace')[-3000:]}")
    return Result(**json.loads(answered.read_text()))


def warm_up(options: argparse.Namespace) -> argparse.Namespace:
    """One small step: the least that a training file may hold."""
    return argparse.Namespace(**{**vars(options), "steps": 1, "batch": 10, "group": 2})


def _rows(chosen: Case, options: argparse.Namespace) -> list[dict[str, object]]:
    return agent_task.rows(options.steps * options.batch, worked_examples=chosen.worked_examples)


def _reset(tool_url: str, seed: int, mean_s: float, p99_s: float) -> None:
    body = {"seed": seed, "mean_s": mean_s, "p99_s": p99_s}
    httpx.post(f"{tool_url}/reset", json=body, timeout=30).raise_for_status()


def _tools(tool_url: str) -> str:
    seen = httpx.get(f"{tool_url}/seen", timeout=30).raise_for_status().json()
    mean = seen["waited_s"] / max(1, seen["calls"])
    return f"{seen['calls']} tool calls of {mean:.2f} s, at most {seen['peak_in_flight']} at once"


def measure(options: argparse.Namespace, scratch: Path) -> float:
    chosen = case(options)
    report.say(
        f"model {chosen.model.id} in {chosen.dtype}; {options.steps} steps of {options.batch} rows × {options.group} "
        f"rollouts, at most {options.max_tokens} tokens; tools lognormal, mean {options.mean:g} s, "
        f"p99 {options.p99:g} s; {options.threads} threads"
    )
    at_once, here, there = list[ledger.Training](), list[ledger.Training](), list[Result]()
    settings = {"sampler_dtype": chosen.dtype, "trainer_dtype": chosen.dtype, "threads": str(options.threads)}
    with tool_server(options.mean, options.p99, scratch / "tools.log") as tool_url:
        if options.only != "trl":
            with service(scratch, [chosen.model], tool_url, **settings) as running:
                _reset(tool_url, 0, 0, 0)
                ours(running, chosen, warm_up(options), tool_url, 0)  # the sampler starts here and compiles its kernels
                for seed in range(1, options.repeats + 1):
                    for mean_s, found in ((0.0, at_once), (options.mean, here)):
                        _reset(tool_url, seed, mean_s, options.p99)
                        found.append(ours(running, chosen, options, tool_url, seed))
                        say_ours(found[-1], f"Hone {seed}, tools {mean_s:g} s", _tools(tool_url))
        for seed in range(1, options.repeats + 1) if options.only != "hone" else ():
            _reset(tool_url, seed, options.mean, options.p99)
            there.append(theirs(chosen, options, tool_url, seed, scratch))
            one = there[-1]
            steps = " ".join(f"{s:.1f}" for s in one.step_seconds)
            report.say(
                f"TRL {seed}: {one.seconds:.1f} s (steps {steps}), {one.rollouts} rollouts, "
                f"{one.tokens} tokens, mean reward {one.reward:.3f}, same prompt tokens: {one.same_prompt_tokens}; "
                f"{_tools(tool_url)}"
            )
    if here:
        rates = [report.median([run.tokens / run.seconds for run in runs]) for runs in (here, at_once)]
        report.say(
            f"Hone: {rates[0]:.0f} tokens/s with slow tools, {rates[1]:.0f} with tools that answer at once: "
            f"{100 * rates[0] / rates[1]:.0f} %"
        )
    if not (here and there):
        return float("nan")
    seconds = report.median([run.seconds for run in here]), report.median([run.seconds for run in there])
    report.say(
        f"medians of {options.repeats}: Hone {seconds[0]:.1f} s, TRL {seconds[1]:.1f} s; mean rewards "
        f"{report.median([run.reward for run in here]):.3f} and {report.median([run.reward for run in there]):.3f}"
    )
    return seconds[1] / seconds[0]


def say_ours(run: ledger.Training, label: str, tools: str) -> None:
    at = [step["at"] for step in run.steps]
    first = run.seconds - (at[-1] - at[0])
    steps = " ".join(f"{s:.1f}" for s in [first, *(b - a for a, b in itertools.pairwise(at))])
    report.say(
        f"{label}: {run.seconds:.1f} s (steps {steps}), {run.rollouts} rollouts {run.states}, {run.tokens} tokens, "
        f"{run.turns:.2f} turns, mean reward {run.reward:.3f}; {tools}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="dataset rows a step")
    parser.add_argument("--group", type=int, default=8, help="rollouts a row")
    parser.add_argument("--max-tokens", type=int, default=224, help="of an episode, tool results included")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--mean", type=float, default=1.0, help="seconds of a tool call")
    parser.add_argument("--p99", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of both sides; tiny float32, smollm2 bfloat16"
    )
    parser.add_argument("--hone", default="{}", help='more job options as JSON, such as {"max_staleness": 0}')
    parser.add_argument("--only", choices=("hone", "trl"), help="one side alone; no ratio")
    options = parser.parse_args()
    report.begin("bench_slow_tools")
    with tempfile.TemporaryDirectory(prefix="hone-bench-") as scratch:
        report.end(measure(options, Path(scratch)))


if __name__ == "__main__":
    main()
