"""Two LoRA jobs at once on one GPU against the same two one after the other; ratio = time in turn / time together.

    python -m benchmarks.gpu.two_jobs [--shape 1.5b|tiny]

Both jobs share one sampler (an adapter slot per live version); each has a trainer of its own. A published figure for
many tenants on one cluster is 2.81 times the experiments per unit of time.
Does not cover: learning (random weights, a reward that means nothing). `--shape tiny` only shows that it runs: on a CPU
both jobs want the same cores.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks.harness import random_job, report, shapes
from benchmarks.harness.processes import tool_server
from benchmarks.harness.service import service


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(shapes.SHAPES), default="1.5b")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    report.begin(f"two_jobs, shape {options.shape}")
    if options.shape == "tiny":
        options.steps, options.batch, options.group, options.tokens = 3, 4, 2, 24
    dtype = "float32" if options.shape == "tiny" else "bfloat16"
    model = shapes.random_model(options.shape, dtype)
    settings = {"sampler_dtype": dtype, "trainer_dtype": dtype, "runner_slots": "2", "sampler_max_adapters": "8"}
    settings |= {"threads": str(os.cpu_count() or 1), "sampler_max_model_len": str(max(2048, 2 * options.tokens))}
    plan = random_job.Plan(options.steps, options.batch, options.group, options.tokens, rank=8)
    with tempfile.TemporaryDirectory(prefix="hone-bench-") as name:
        scratch = Path(name)
        with (
            tool_server(0, 0, scratch / "tools.log") as tool_url,
            service(scratch, [model], tool_url, **settings) as running,
        ):
            alone = [random_job.run(running, model, tool_url, [plan])[0] for _ in range(3)][1:]  # the first warms up
            both = random_job.run(running, model, tool_url, [plan, plan])
    in_turn = sum(one.seconds for one in alone)
    # Each from its own first rollout, so the later start of the second is not counted twice.
    together = max(one.began + one.seconds for one in both) - min(one.began for one in both)
    report.say(
        f"in turn {in_turn:.1f} s ({', '.join(f'{one.seconds:.1f}' for one in alone)}), together {together:.1f} s"
    )
    if report.accelerator() == "no GPU":
        report.say("no GPU: this figure says nothing about one")
    report.end(in_turn / together)


if __name__ == "__main__":
    main()
