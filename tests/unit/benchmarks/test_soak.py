"""The soak's verdict tells growth from noise."""

from __future__ import annotations

import pytest

from benchmarks.soak import Look, verdict


def looks(values: list[float], name: str) -> list[Look]:
    return [Look(at, {name: value}) for at, value in enumerate(values)]


@pytest.mark.parametrize(
    ("name", "values", "grows"),
    [
        ("sampler MiB", [100.0 + 2 * at for at in range(40)], True),
        ("sampler MiB", [50.0] * 10 + [500.0] * 30, False),  # the start-up is not growth
        ("keeper MiB", [70.0] * 30 + [78.0] * 10, False),  # a few MiB more are noise
        ("adapter slots", [3.0] * 20 + [4.0] * 20, False),
        ("files", [50.0 + at for at in range(40)], True),
        ("adapter slots", [0.0] * 30 + [1.0] * 10, True),
    ],
)
def test_only_what_keeps_rising_grows(name: str, values: list[float], grows: bool) -> None:
    assert verdict(looks(values, name), name)[1] is grows
