"""How busy a sampler is, read from the Prometheus text of its `/metrics` (names of vLLM 0.32).

Does not cover: fetching the text (`client`) and what follows from it (`workers.rollouts.congestion`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
KV_USAGE = "vllm:kv_cache_usage_perc"  # a share from 0 to 1, whatever the name says
PREEMPTIONS = "vllm:num_preemptions_total"
GENERATED = "vllm:generation_tokens_total"
_WANTED = frozenset({RUNNING, WAITING, KV_USAGE, PREEMPTIONS, GENERATED})


class LoadUnreadable(ValueError):
    """The text is not a sampler's metrics: no number of running and waiting requests can be read from it."""


@dataclass(frozen=True)
class SamplerLoad:
    """One observation of one sampler, or of several together. The last two are counters since its start."""

    running: int
    waiting: int
    kv_usage: float
    preemptions: int
    generation_tokens: int
    samplers: int = 1


def parse_load(text: str) -> SamplerLoad:
    """One server's load; its data-parallel engines (label `engine`) are added up. Raises `LoadUnreadable`.

    Running and waiting are required. A server without the others never says that it is full: they count as 0.
    """
    found: dict[str, list[float]] = {}
    # vLLM answers with over a thousand histogram lines: only the few that are wanted go through the parser.
    lines = "".join(line + "\n" for line in text.splitlines() if _name(line) in _WANTED)
    try:
        for family in text_string_to_metric_families(lines):
            for sample in family.samples:
                if math.isfinite(sample.value):
                    found.setdefault(sample.name, []).append(sample.value)
    except ValueError as error:
        raise LoadUnreadable(f"the sampler's metrics cannot be read: {error}") from error
    if RUNNING not in found or WAITING not in found:
        raise LoadUnreadable(f"the sampler's metrics hold no {RUNNING} and {WAITING}")
    return SamplerLoad(
        running=_total(found[RUNNING]),
        waiting=_total(found[WAITING]),
        kv_usage=max(found.get(KV_USAGE, ()), default=0.0),
        preemptions=_total(found.get(PREEMPTIONS, ())),
        generation_tokens=_total(found.get(GENERATED, ())),
    )


def together(loads: Sequence[SamplerLoad]) -> SamplerLoad:
    """Several samplers as one: requests and counters add up, the fullest cache counts. `loads` is not empty."""
    return SamplerLoad(
        running=sum(load.running for load in loads),
        waiting=sum(load.waiting for load in loads),
        kv_usage=max(load.kv_usage for load in loads),
        preemptions=sum(load.preemptions for load in loads),
        generation_tokens=sum(load.generation_tokens for load in loads),
        samplers=sum(load.samplers for load in loads),
    )


def _name(line: str) -> str:
    return line.partition("{")[0].partition(" ")[0]


def _total(values: Iterable[float]) -> int:
    return round(sum(values))
