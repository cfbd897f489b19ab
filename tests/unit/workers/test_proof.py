"""The proof that the served policy is the trained one."""

from __future__ import annotations

import json
import math

import pytest

from workers.sampler.proof import BF16_LIMIT, FP32_LIMIT, compare, limit_for


def test_the_same_numbers_hold_exactly() -> None:
    match = compare([[-1.0, -2.0], [-3.0]], [[-1.0, -2.0], [-3.0]], FP32_LIMIT)
    assert (match.tokens, match.mean_abs, match.max_abs, match.k3, match.holds) == (3, 0.0, 0.0, 0.0, True)


def test_the_figures_are_over_all_tokens() -> None:
    match = compare([[-1.0, -2.0], [-3.0]], [[-1.0, -2.3], [-3.0]], 0.1)
    assert match.mean_abs == pytest.approx(0.1)
    assert match.max_abs == pytest.approx(0.3)
    assert match.k3 == pytest.approx((math.exp(0.3) - 1 - 0.3) / 3)


@pytest.mark.parametrize(("difference", "holds"), [(0.0009, True), (0.0011, False), (-0.0011, False)])
def test_the_limit_decides(difference: float, holds: bool) -> None:
    assert compare([[-1.0 + difference]], [[-1.0]], FP32_LIMIT).holds is holds


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, -2000.0, 2000.0])
def test_a_broken_number_never_holds_and_is_still_reported(broken: float) -> None:
    for served, trained in (([-1.0, broken], [-1.0, -1.0]), ([-1.0, -1.0], [-1.0, broken])):
        match = compare([served], [trained], 1.0)
        assert not match.holds
        assert match.as_dict()["holds"] is False
        json.dumps(match.as_dict(), allow_nan=False)


def test_rows_of_another_length_are_a_bug() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare([[-1.0]], [[-1.0, -2.0]], 1.0)
    with pytest.raises(ValueError, match="zip"):
        compare([[-1.0]], [], 1.0)


def test_the_band_follows_precision_and_what_version_zero_showed() -> None:
    assert limit_for("float32", "float32", 0.5) == FP32_LIMIT
    assert limit_for("bfloat16", "bfloat16", None) == BF16_LIMIT
    assert limit_for("bfloat16", "float32", 0.01) == BF16_LIMIT
    assert limit_for("float32", "bfloat16", 0.07) == pytest.approx(0.14)
