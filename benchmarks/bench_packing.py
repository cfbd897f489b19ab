"""Tokens forwarded and time per update: one trie, length-sorted padded rows, and what the trainer chooses itself.

Does not cover: publication, snapshot and canary. Weights are random; rows are `--groups` groups of 8 rollouts of about
`--tokens` tokens, of which siblings share 90 %, 50 % and 10 %; completions differ in length by up to a factor of 3.
`ratio` is the geometric mean over the three of padded seconds to the seconds of the trainer's own choice.

    python -m benchmarks.bench_packing [--shape tiny] [--dtype bfloat16] [--threads 2] [--groups 4] [--tokens 512]
"""

from __future__ import annotations

import argparse
import math
import os
import random

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the trainer process does; before torch is loaded

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.bench_update import LINEAR, SHAPE, timed_steps
from workers.batch import TrainingRow
from workers.messages import LoraSpec
from workers.trainer import budget, model
from workers.trainer.__main__ import keep_memory

SHARED = (0.9, 0.5, 0.1)
SIBLINGS = 8
TINY = {
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
SHAPES = {"tiny": {**SHAPE, **TINY}, "smol": SHAPE}


def make_rows(groups: int, tokens: int, shared: float, vocabulary: int) -> list[TrainingRow]:
    """Two sampled turns around a tool result of half their length, behind a prompt that is the group's own."""
    rng = random.Random(0)

    def draw(count: float) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(max(1, round(count)))]

    rows = []
    for group in range(groups):
        prompt = draw(shared * tokens)
        for _ in range(SIBLINGS):
            own = (1 - shared) * tokens * rng.uniform(0.5, 1.5)
            call, result, answer = draw(own / 3), draw(own / 3), draw(own / 3)
            mask = [0] * len(prompt) + [1] * len(call) + [0] * len(result) + [1] * len(answer)
            log_probs = [-math.log(vocabulary) * m for m in mask]
            rows.append(TrainingRow(prompt + call + result + answer, mask, log_probs, rng.uniform(-1, 1), group))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smol")
    parser.add_argument("--dtype", choices=sorted(model.DTYPES), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(arguments.threads)
    shape = SHAPES[arguments.shape]
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**shape)).to(model.DTYPES[arguments.dtype])
    if torch.cuda.is_available():
        base = base.cuda()
    policy = model.add_adapter(base, LoraSpec(16, 32, LINEAR), seed=0)
    print(f"shape={arguments.shape} dtype={arguments.dtype} threads={arguments.threads} device={base.device}")
    gains: list[tuple[float, float]] = []
    for shared in SHARED:
        rows = make_rows(arguments.groups, arguments.tokens, shared, shape["vocab_size"])
        cost = {}
        for name, arrange in (("packed", budget.packed), ("padded", budget.padded), ("chosen", budget.cheaper)):
            label = f"shared={shared:.0%} {name}"
            cost[name] = timed_steps(policy, rows, label, arrange, steps=arguments.steps)
        saved = [f"{p / q:.2f}" for p, q in zip(cost["padded"], cost["packed"], strict=True)]
        print(f"shared={shared:.0%} padded/packed: seconds={saved[0]} cpu_seconds={saved[1]}")
        gains.append((cost["padded"][0] / cost["chosen"][0], cost["padded"][1] / cost["chosen"][1]))
    wall, cpu = (math.prod(column) ** (1 / len(gains)) for column in zip(*gains, strict=True))
    # On a machine with other work, trust this one: it counts what we used, not what we waited for.
    print(f"cpu_ratio={cpu:.2f}")
    print(f"ratio={wall:.2f}")


if __name__ == "__main__":
    main()
