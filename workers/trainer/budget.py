"""Which rows go through the model together: shares of ranks, micro-batches within a token budget, packed or padded.

Does not cover: the packing of one micro-batch (`workers.trainer.packing`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workers.trainer.packing import owned_tokens, trie_order

Rows = Sequence[Sequence[int]]

CPU_ACTIVATION_BYTES = 3 * 2**30
MEMORY_SHARE = 0.4  # of what is free when the trainer starts; the rest is logits, gradients, the neighbours
CHECKPOINTED_SHARE = 8  # a checkpointed layer keeps about one eighth of its activations
ALIKE = 1.25  # longest to shortest row of a large padded micro-batch
WORTHWHILE = 0.9  # see `benchmarks.bench_packing`


@dataclass(frozen=True)
class Budget:
    """Tokens forwarded in one micro-batch with all activations kept, and with gradient checkpointing."""

    tokens: int

    @property
    def checkpointed_tokens(self) -> int:
        return self.tokens * CHECKPOINTED_SHARE


@dataclass(frozen=True)
class MemoryLimits:
    """What this process may take: `processes` share the host's memory; `gpu_share` of its GPU (None: what is free)."""

    processes: int = 1
    gpu_share: float | None = None


@dataclass(frozen=True)
class MicroBatches:
    """Row indices of each micro-batch, whether each is one trie, and whether layers must be checkpointed to fit."""

    rows: tuple[tuple[int, ...], ...]
    checkpoint: bool
    packed: bool


def token_budget(config: Any, dtype: torch.dtype, device: torch.device, limits: MemoryLimits) -> Budget:
    """From the shape of the model and the memory that is free now; at least 512 tokens."""
    text = config.get_text_config()
    per_layer = 10 * text.hidden_size + 4 * text.intermediate_size
    per_token = text.num_hidden_layers * per_layer * dtype.itemsize
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if limits.gpu_share is not None:
            free = min(free, int(total * limits.gpu_share) - torch.cuda.memory_allocated(device))
        memory = int(free * MEMORY_SHARE)
    else:
        memory = min(CPU_ACTIVATION_BYTES, int(available_memory() * MEMORY_SHARE)) // limits.processes
    return Budget(max(512, memory // per_token))


def available_memory() -> int:
    """Bytes that can be had without swapping: Linux counts reclaimable page cache in, `sysconf` does not."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def share(rows: Rows, rank: int, size: int) -> list[int]:
    """The rows of one rank: a stretch of the trie order, so that siblings stay together; equal in tokens to forward."""
    order = trie_order(rows)
    owned = owned_tokens([rows[i] for i in order])
    step = sum(owned) / size
    mine, before = [], 0
    for index, cost in zip(order, owned, strict=True):
        if min(size - 1, int((before + cost / 2) / max(step, 1))) == rank:
            mine.append(index)
        before += cost
    return mine


def packed(rows: Rows, budget: Budget) -> MicroBatches:
    """Cut the trie order where the budget ends; the first row of a micro-batch pays for its whole path again."""
    order = trie_order(rows)
    checkpoint = max(map(len, rows), default=0) > budget.tokens
    limit = budget.checkpointed_tokens if checkpoint else budget.tokens
    owned = owned_tokens([rows[i] for i in order])
    batches: list[list[int]] = []
    used = 0
    for index, cost in zip(order, owned, strict=True):
        if not batches or used + cost > limit:
            batches.append([])
            used, cost = 0, len(rows[index]) - 1
        batches[-1].append(index)
        used += cost
    return MicroBatches(tuple(map(tuple, batches)), checkpoint, packed=True)


def padded(rows: Rows, budget: Budget, few: int = 8) -> MicroBatches:
    """Neighbours in length together within the budget, padding counted; beyond `few` rows only if alike in length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    checkpoint = max(map(len, rows), default=0) > budget.tokens
    limit = budget.checkpointed_tokens if checkpoint else budget.tokens
    batches: list[list[int]] = []
    for index in order:
        batch, length = (batches[-1] if batches else []), len(rows[index])
        unlike = len(batch) >= few and length > ALIKE * len(rows[batch[0]])
        if not batch or unlike or (len(batch) + 1) * length > limit:
            batches.append(batch := [])
        batch.append(index)
    return MicroBatches(tuple(map(tuple, batches)), checkpoint, packed=False)


def cheaper(rows: Rows, budget: Budget) -> MicroBatches:
    """Packed, unless that saves too few tokens to pay for its attention in many small calls."""
    trie, lines = packed(rows, budget), padded(rows, budget)
    return trie if forwarded(rows, trie) <= WORTHWHILE * forwarded(rows, lines) else lines


def forwarded(rows: Rows, cut: MicroBatches) -> int:
    """Tokens that go through the model, padding counted."""
    if not cut.packed:
        return sum(len(batch) * max(len(rows[i]) for i in batch) for batch in cut.rows)
    return sum(sum(owned_tokens([rows[i] for i in batch])) for batch in cut.rows)
