"""Samples trained per GPU-hour, whole service, 1.5B-shaped model of random weights; ratio = ours / 19,000.

    python -m benchmarks.gpu.samples_per_gpu_hour [--shape 1.5b|tiny] [--gpus N] [--tokens 1024]

The recipe of the published runs (Qwen2.5-Math-1.5B, LoRA rank 1, 8 rollouts a prompt, staleness at most 4, packed 16k):
about 19,000 samples per H200-hour in the tuned one, 4,600 in the first. Random weights seldom end a turn, so that
nearly every sample has `--tokens` sampled tokens: tokens per second are printed too, since the published mean length
is not known. The reward means nothing (a hash of the text): every group has a signal, as the update does not care.
Does not cover: learning; several machines. `--shape tiny` only shows that it runs.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks.harness import random_job, report, shapes
from benchmarks.harness.processes import tool_server
from benchmarks.harness.service import service

PUBLISHED = 19_000  # per H200-hour: 84,078 samples in 53 minutes on 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(shapes.SHAPES), default="1.5b")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of this host that the run may use")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16, help="prompts a step")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024, help="sampled tokens of a rollout, at most")
    options = parser.parse_args()
    report.begin(f"samples_per_gpu_hour, shape {options.shape}")
    small = options.shape == "tiny"
    if small:
        options.steps, options.batch, options.group, options.tokens = 3, 4, 4, 32
    dtype = "float32" if small else "bfloat16"
    model = shapes.random_model(options.shape, dtype)
    settings = {"sampler_dtype": dtype, "trainer_dtype": dtype, "max_concurrent_rollouts": "384"}
    settings |= {"threads": str(os.cpu_count() or 1), "sampler_max_model_len": str(max(2048, 2 * options.tokens))}
    with tempfile.TemporaryDirectory(prefix="hone-bench-") as name:
        scratch = Path(name)
        with (
            tool_server(0, 0, scratch / "tools.log") as tool_url,
            service(scratch, [model], tool_url, **settings) as running,
        ):
            plan = random_job.Plan(options.steps, options.batch, options.group, options.tokens, rank=1)
            found = random_job.run(running, model, tool_url, [plan], staleness=1 if small else 4)[0]
    samples = found.rollouts / found.seconds * 3600 / options.gpus
    report.say(
        f"{found.rollouts} samples in {found.seconds:.1f} s, mean {found.tokens / found.rollouts:.0f} sampled tokens: "
        f"{samples:.0f} samples per GPU-hour, {found.tokens / found.seconds / options.gpus:.0f} tokens/s per GPU; "
        f"states {found.states}"
    )
    if report.accelerator() == "no GPU":
        report.say("no GPU: this figure says nothing about one")
    report.end(samples / PUBLISHED)


if __name__ == "__main__":
    main()
