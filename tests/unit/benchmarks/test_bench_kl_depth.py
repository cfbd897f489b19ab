"""Drift by depth: which positions are compared, and what counts as growing."""

from __future__ import annotations

import math

import pytest

from benchmarks.bench_kl_depth import Drift, Transcript, drift


def test_every_sampled_position_is_compared_with_the_score_of_its_own_token() -> None:
    transcript = Transcript(ids=[7, 8, 9, 10, 11], turn_at={2: 0, 4: 1}, log_prob_at={2: -1.0, 4: -2.0})
    found = drift([transcript], [[-9.0, -1.5, -9.0, -2.0]])
    assert found.differences == {0: [-0.5], 1: [0.0]}
    assert found.max() == 0.5
    assert found.k3() == pytest.approx((math.expm1(-0.5) + 0.5) / 2)


def test_noise_that_rises_with_depth_has_a_slope_above_one() -> None:
    flat = Drift({turn: [0.01, -0.01] for turn in range(30)})
    rising = Drift({turn: [0.001 * turn] for turn in range(1, 31)})
    assert flat.slope() == pytest.approx(1.0)
    assert rising.slope() > 10
