"""What a step reports about its tokens, and which of them are masked."""

from __future__ import annotations

import pytest
import torch

from workers.trainer.diagnostics import Clip, Diagnostics, TokenFacts
from workers.trainer.importance import Limits, kept_tokens, turn_depth


def facts(ratios: list[float], depth: list[int], advantage: float = 1.0) -> TokenFacts:
    new, zero = torch.tensor(ratios).log(), torch.zeros(len(ratios))
    kept = torch.ones(len(ratios), dtype=torch.bool)
    return TokenFacts(new, zero, zero + 2, zero + advantage, kept, torch.tensor(depth), zero + 0.5)


def test_depth_counts_the_runs_of_sampled_tokens() -> None:
    assert turn_depth([0, 0, 1, 1, 0, 1, 0, 0, 1]) == [0, 0, 0, 0, 0, 1, 1, 1, 2]
    assert turn_depth([1, 0, 1]) == [0, 0, 1]


def test_tokens_and_whole_rows_are_masked_by_their_ratio() -> None:
    old = torch.zeros(3, 4)
    new = torch.tensor([[1.0, 1.1, 0.4, 9.0], [1.0, 2.2, 1.0, 1.0], [1.4, 1.5, 1.4, 1.5]]).log()
    trained = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
    kept, rows = kept_tokens(new, old, trained, Limits((0.5, 2.0), 0.2))
    assert kept.tolist() == [[True, True, False, False], [True, False, True, True], [False] * 4]
    assert rows.tolist() == [False, False, True]
    everything, none = kept_tokens(new, old, trained, Limits())
    assert everything.equal(trained.bool())
    assert not none.any()


def test_a_row_without_a_number_is_masked() -> None:
    new = torch.tensor([[0.0, float("nan")]])
    kept, _ = kept_tokens(new, torch.zeros(1, 2), torch.ones(1, 2), Limits((0.5, 2.0), 0.25))
    assert not kept.any()


def test_mismatch_is_reported_by_turn_with_deep_turns_pooled() -> None:
    seen = Diagnostics(Clip(None, None))
    seen.add(facts([1.0, 2.0, 2.0, 4.0], [0, 0, 8, 30]), 1, 0)
    metrics = seen.metrics()
    assert metrics["mismatch_mean_depth_0"] == pytest.approx(0.5 * torch.tensor(2.0).log().item())
    assert metrics["mismatch_kl_depth_8"] == pytest.approx(((2 - 1 - 0.693147) + (4 - 1 - 1.386294)) / 2, rel=1e-4)
    assert {name for name in metrics if "_depth_" in name} == {
        f"mismatch_{kind}_depth_{depth}" for kind in ("kl", "mean") for depth in (0, 8)
    }


def test_quantiles_are_of_all_ranks_and_shares_of_all_tokens() -> None:
    one, other = Diagnostics(Clip(0.8, 1.2)), Diagnostics(Clip(0.8, 1.2))
    one.add(facts([1.0] * 98 + [3.0], [0] * 99), 2, 1)
    other.add(facts([0.01], [0], advantage=-1.0), 1, 0)
    one.include([other])
    metrics = one.metrics()
    assert (metrics["importance_p50"], metrics["importance_max"]) == (1.0, 3.0)
    assert metrics["importance_p01"] < 1 < metrics["importance_p99"]
    assert metrics["masked_sequence_share"] == pytest.approx(1 / 3)
    assert (metrics["clip_ratio_low"], metrics["clip_ratio_high"]) == (0.01, 0.01)
    assert (metrics["trained_tokens"], metrics["kl_to_base"], metrics["entropy"]) == (100, 0.5, 2.0)
