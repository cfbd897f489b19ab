"""Trainer tokens per second: 4B shape, LoRA rank 16, 16k tokens packed; ratio = ours / 6,229.

    python -m benchmarks.gpu.trainer_tokens [--shape 4b|1.5b|tiny] [--tokens 16384] [--row 2048]

6,229 tokens/s is the published figure of another trainer on one H100 (Qwen3-4B, the same adapter and packing). Rows
share no prefix, so that a packed token is a token and sharing flatters nobody. A step is one update: forward, backward,
optimizer. The trainer itself decides by the free memory whether the 16k go through at once and with checkpointing; both
are printed. Does not cover: publication, snapshot, several GPUs. `--shape tiny` only shows that it runs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import tempfile
import time

import torch
from peft import PeftModel
from transformers import TrainerCallback

from benchmarks.harness import adapters, report, shapes
from workers.batch import TrainingRow
from workers.trainer import grpo

PUBLISHED = 6_229
RANK = 16


class Quiet(TrainerCallback):  # type: ignore[misc]  # untyped base
    """No publication, no snapshot."""


def rows_of(tokens: int, length: int, vocabulary: int) -> list[TrainingRow]:
    """Rows of random ids; the first quarter of each is its prompt."""
    rng = random.Random(0)
    found = []
    for group in range(max(1, tokens // length)):
        ids = [rng.randrange(vocabulary) for _ in range(length)]
        mask = [int(at >= length // 4) for at in range(length)]
        found.append(TrainingRow(ids, mask, [-10.0 * m for m in mask], rng.uniform(-1, 1), group))
    return found


def step_seconds(policy: PeftModel, rows: list[TrainingRow], steps: int) -> list[float]:
    """Seconds of each update; prints how it was cut."""
    marks: list[float] = []

    def next_rows() -> list[TrainingRow]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        return rows

    hyper = grpo.Hyperparameters(
        steps=steps, learning_rate=1e-5, loss_type="dapo", temperature=1.0, epsilon=0.2, max_grad_norm=1.0, seed=0
    )
    with tempfile.TemporaryDirectory() as scratch:
        optimizer = grpo.make_optimizer(policy, 1e-5)
        trainer = grpo.PackedGRPO(policy, hyper, scratch, next_rows, lambda *_: None, Quiet(), optimizer)
        trainer.train()
        metrics = trainer.diagnostics.metrics()
        report.say(
            f"{metrics['raw_tokens']:.0f} tokens a step in {metrics['micro_batches']:.0f} micro-batches, "
            f"{metrics['forwarded_tokens']:.0f} forwarded, checkpointing {trainer.model.is_gradient_checkpointing}"
        )
    next_rows()
    return [b - a for a, b in itertools.pairwise(marks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(shapes.SHAPES), default="4b")
    parser.add_argument("--tokens", type=int, default=16384, help="of one packed row and of one update")
    parser.add_argument("--row", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    report.begin(f"trainer_tokens, shape {options.shape}")
    if options.shape == "tiny":
        options.tokens, options.row, options.steps = 2048, 512, 3
    if not torch.cuda.is_available():
        torch.set_num_threads(os.cpu_count() or 1)
    dtype = "float32" if options.shape == "tiny" else "bfloat16"
    model = shapes.random_model(options.shape, dtype)
    policy = adapters.random_policy(model, dtype, RANK)
    rows = rows_of(options.tokens, options.row, int(policy.config.vocab_size))
    spans = step_seconds(policy, rows, options.steps)
    tokens = sum(len(row.ids) for row in rows)
    rate = tokens / report.median(spans[1:] or spans)  # the first step compiles and allocates
    peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
    report.say(f"{len(rows)} rows; steps {' '.join(f'{s:.2f}' for s in spans)} s{peak}")
    report.say(f"{rate:.0f} tokens/s (median without the first step)")
    if report.accelerator() == "no GPU":
        report.say("no GPU: this figure says nothing about one")
    report.end(rate / PUBLISHED)


if __name__ == "__main__":
    main()
