"""How long one update takes: prefix-packed against padded micro-batches of 8, same rows, same process.

Does not cover: publication, snapshot and canary (they are in `StepDone.seconds`). Weights are random, in the shape of
the demo's model; the rows have the demo's shape: 64 rollouts behind one few-shot prefix, in groups of 8.

    python -m benchmarks.bench_update [--dtype bfloat16] [--threads 2] [--profile]
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the trainer process does; before torch is loaded

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from workers.batch import TrainingRow
from workers.messages import LoraSpec
from workers.trainer import budget, grpo, model
from workers.trainer.__main__ import keep_memory

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}


Arrange = Callable[[budget.Rows, budget.Budget], budget.MicroBatches]


def demo_rows(seed: int = 0) -> list[TrainingRow]:
    """64 rows, about 20,900 tokens: prefix 252, question 24, then call (24), tool result (13, masked), answer (14)."""
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(SHAPE["vocab_size"]) for _ in range(count)]

    prefix, rows = tokens(252), []
    for group in range(8):
        question = prefix + tokens(24)
        for _ in range(8):
            call, result, answer = tokens(rng.randint(18, 30)), tokens(13), tokens(rng.randint(8, 20))
            mask = [0] * len(question) + [1] * len(call) + [0] * len(result) + [1] * len(answer)
            ids = question + call + result + answer
            rows.append(TrainingRow(ids, mask, [-10.8 * m for m in mask], rng.uniform(-1, 1), group))
    return rows


def timed_steps(
    policy: PeftModel, rows: list[TrainingRow], name: str, arrange: Arrange, *, steps: int, profile: bool = False
) -> tuple[float, float]:
    """Seconds and CPU seconds of the fastest of `steps` updates; prints them with tokens forwarded and peak memory."""
    marks: list[tuple[float, float]] = []

    def next_rows() -> list[TrainingRow]:
        marks.append((time.perf_counter(), time.process_time()))
        return rows

    hyper = grpo.Hyperparameters(
        steps=steps, learning_rate=3e-4, loss_type="dapo", temperature=1.0, epsilon=0.2, max_grad_norm=1.0, seed=0
    )
    with tempfile.TemporaryDirectory() as scratch:
        trainer = grpo.PackedGRPO(
            policy, hyper, scratch, next_rows, lambda *_: None, Quiet(), grpo.make_optimizer(policy, 3e-4)
        )
        trainer.arrange = arrange
        if profile:
            with torch.profiler.profile(with_stack=False) as record:
                trainer.train()
            print(record.key_averages().table(sort_by="self_cpu_time_total", row_limit=45, max_name_column_width=50))
        else:
            trainer.train()
    marks.append((time.perf_counter(), time.process_time()))
    spans = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)]
    seconds, cpu_seconds = map(min, zip(*spans, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    metrics = trainer.diagnostics.metrics()
    print(
        f"{name}: raw={metrics['raw_tokens']:.0f} trained={metrics['trained_tokens']:.0f} "
        f"forwarded={metrics['forwarded_tokens']:.0f} micro_batches={metrics['micro_batches']:.0f} "
        f"seconds={seconds:.2f} cpu_seconds={cpu_seconds:.2f} peak_rss_gib={peak:.2f}",
        flush=True,
    )
    return seconds, cpu_seconds


class Quiet(TrainerCallback):  # type: ignore[misc]  # untyped base
    """No publication, no snapshot."""


def gemm_gflops(dtype: torch.dtype) -> float:
    """Best rate of the update's most frequent product, to compare machines by."""
    x, w = torch.randn(3600, 576, dtype=dtype), torch.randn(1536, 576, dtype=dtype)
    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - began)
    return 2 * 3600 * 576 * 1536 / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", choices=sorted(model.DTYPES), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--only-packed", action="store_true")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(arguments.threads)
    dtype = model.DTYPES[arguments.dtype]
    print(f"dtype={arguments.dtype} threads={arguments.threads} gemm_gflops={gemm_gflops(dtype):.0f}")
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": arguments.layers})).to(dtype)
    policy = model.add_adapter(base, LoraSpec(16, 32, LINEAR), seed=0)
    rows = demo_rows()
    packed = timed_steps(policy, rows, "packed", budget.packed, steps=arguments.steps, profile=arguments.profile)
    if not arguments.only_packed:
        padded = timed_steps(policy, rows, "padded", budget.padded, steps=1)
        # On a machine with other work, trust this one: it counts what we used, not what we waited for.
        print(f"cpu_ratio={padded[1] / packed[1]:.2f}")
        print(f"ratio={padded[0] / packed[0]:.2f}")


if __name__ == "__main__":
    main()
