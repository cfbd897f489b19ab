"""Draws follow the distribution that was asked for; log-probs are those of the raw one."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from workers.sampler.builtin.generation import Generation
from workers.sampler.builtin.sampling import Draw, Row, Sampler

PLAIN = Generation(prompt=(1,), max_tokens=1)


def draws(logits: torch.Tensor, count: int, **params: Any) -> list[Draw]:
    rng = random.Random(0)
    rows = [Row(replace(PLAIN, **params), rng, [0]) for _ in range(count)]
    return Sampler().draw(logits.expand(count, -1), rows)


@pytest.mark.parametrize("vocabulary", [5, 64, 1187, 1024])
def test_frequencies_follow_the_softmax(vocabulary: int) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1)) * 2
    found = torch.bincount(torch.tensor([d.token for d in draws(logits, 4000)]), minlength=vocabulary) / 4000
    assert found.shape[0] == vocabulary
    assert float((found - logits.softmax(-1)).abs().max()) < 0.03


def test_log_probs_are_the_log_softmax_of_the_raw_logits() -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(2)) * 5
    for params in ({}, {"temperature": 0.3}, {"top_k": 3}, {"repetition_penalty": 2.0}):
        for d in draws(logits, 5, **params):
            assert d.log_prob == pytest.approx(float(logits.log_softmax(-1)[d.token]), abs=1e-5)


def test_a_token_without_weight_is_never_drawn() -> None:
    logits = torch.full((512,), -torch.inf)
    logits[[3, 300]] = 0.0
    assert {d.token for d in draws(logits, 200)} == {3, 300}


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"temperature": 0.0}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.7}, {0, 1}),
        ({"min_p": 0.3}, {0, 1}),
        ({"top_k": -1, "temperature": 1e-3}, {0}),
    ],
)
def test_filters_keep_exactly_their_tokens(params: dict[str, Any], kept: set[int]) -> None:
    logits = torch.tensor([0.6, 0.25, 0.1, 0.05]).log()
    assert {d.token for d in draws(logits, 300, **params)} == kept


def test_a_repetition_penalty_makes_seen_tokens_rarer() -> None:
    logits = torch.tensor([2.0, 1.9, -8.0])
    assert {d.token for d in draws(logits, 20, repetition_penalty=1.5, temperature=0.0)} == {1}


def test_plain_and_filtered_rows_may_stand_side_by_side() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0], [9.0, 0.0, 1.0]])
    rows = [Row(replace(PLAIN, temperature=0.0), random.Random(1), []), Row(PLAIN, random.Random(2), [])]
    assert [d.token for d in Sampler().draw(logits, rows)] == [1, 0]


def test_more_rows_than_a_group_are_all_answered() -> None:
    assert len(draws(torch.zeros(40), 150)) == 150


def test_a_broken_model_gives_a_log_prob_that_is_not_finite() -> None:
    assert not math.isfinite(draws(torch.full((8,), math.nan), 1)[0].log_prob)


def test_a_score_has_log_prob_and_rank() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    [(log_prob, rank)] = Sampler().score(logits, torch.tensor([2]))
    assert log_prob == pytest.approx(float(logits[0].log_softmax(-1)[2]), abs=1e-6)
    assert rank == 2
