"""How many rows go through the model at once: micro-batches within a token budget.

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

CPU_ACTIVATION_BYTES = 3 * 2**30
MEMORY_SHARE = 0.4  # of what is free when the trainer starts; the rest is logits, gradients, the neighbours
CHECKPOINTED_SHARE = 8  # a checkpointed layer keeps about one eighth of its activations


@dataclass(frozen=True)
class Budget:
    """Tokens forwarded in one micro-batch with all activations kept, and with gradient checkpointing."""

    tokens: int

    @property
    def checkpointed_tokens(self) -> int:
        return self.tokens * CHECKPOINTED_SHARE


@dataclass(frozen=True)
class MicroBatches:
    """Row indices of each micro-batch, and whether their layers must be checkpointed to fit."""

    rows: tuple[tuple[int, ...], ...]
    checkpoint: bool


def token_budget(config: Any, dtype: torch.dtype, device: torch.device) -> Budget:
    """From the shape of the model and the memory that is free now; at least 512 tokens."""
    text = config.get_text_config()
    per_layer = 10 * text.hidden_size + 4 * text.intermediate_size
    per_token = text.num_hidden_layers * per_layer * dtype.itemsize
    if device.type == "cuda":
        memory = int(torch.cuda.mem_get_info(device)[0] * MEMORY_SHARE)
    else:
        memory = min(CPU_ACTIVATION_BYTES, int(available_memory() * MEMORY_SHARE))
    return Budget(max(512, memory // per_token))


def available_memory() -> int:
    """Bytes that can be had without swapping: Linux counts reclaimable page cache in, `sysconf` does not."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def packed(rows: Sequence[Sequence[int]], budget: Budget) -> MicroBatches:
    """Cut the trie order where the budget ends; the first row of a micro-batch pays for its whole path again."""
    order = trie_order(rows)
    checkpoint = max(len(row) for row in rows) > budget.tokens
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
    return MicroBatches(tuple(map(tuple, batches)), checkpoint)


def padded(rows: Sequence[Sequence[int]], budget: Budget, most: int = 8) -> MicroBatches:
    """Neighbours in length together, at most `most` rows and the budget's tokens, padding counted."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    checkpoint = len(rows[order[-1]]) > budget.tokens
    limit = budget.checkpointed_tokens if checkpoint else budget.tokens
    batches: list[list[int]] = []
    for index in order:
        if not batches or len(batches[-1]) == most or (len(batches[-1]) + 1) * len(rows[index]) > limit:
            batches.append([])
        batches[-1].append(index)
    return MicroBatches(tuple(map(tuple, batches)), checkpoint)
