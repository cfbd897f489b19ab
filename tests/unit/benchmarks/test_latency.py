"""The latencies of the benchmarks have the mean and the p99 that were asked for."""

from __future__ import annotations

import random

import pytest

from benchmarks.harness.latency import ImpossibleLatency, Lognormal


def test_mean_and_p99_are_those_that_were_asked_for() -> None:
    rng = random.Random(1)
    drawn = sorted(Lognormal.of(1.0, 10.0).draw(rng) for _ in range(100_000))
    assert sum(drawn) / len(drawn) == pytest.approx(1.0, rel=0.05)
    assert drawn[99_000] == pytest.approx(10.0, rel=0.05)


def test_a_mean_of_zero_answers_at_once() -> None:
    assert Lognormal.of(0.0, 10.0).draw(random.Random(1)) == 0.0


@pytest.mark.parametrize(("mean", "p99"), [(1.0, 16.0), (2.0, 1.0), (-1.0, 1.0)])
def test_a_pair_that_no_lognormal_has_is_refused(mean: float, p99: float) -> None:
    with pytest.raises(ImpossibleLatency):
        Lognormal.of(mean, p99)
