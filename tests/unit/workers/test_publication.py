"""A version is proved before anything is sampled from it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from app.samplers.service import Adapter
from workers.messages import Published
from workers.publication import Publisher
from workers.setup import JobFailure

CANARY = [[1, 2, 3], [4, 5]]
BASE = [[-1.0, -2.0], [-3.0]]


def moved(scores: Sequence[Sequence[float]], by: float) -> list[list[float]]:
    return [[value + by for value in row] for row in scores]


class Policy:
    """Serves what it is told under each name."""

    base_model = "tiny"

    def __init__(self, **served: Sequence[Sequence[float]]) -> None:
        self.served = {"tiny": BASE, **served}
        self.published: list[tuple[int, Adapter]] = []

    async def publish(self, version: int, adapter: Adapter) -> None:
        self.published.append((version, adapter))

    async def score(self, name: str, sequences: Sequence[Sequence[int]]) -> Sequence[Sequence[float]]:
        assert [version for version, _ in self.published], "loaded before it is asked"
        assert sequences == CANARY
        return self.served[name]


def trained(directory: Path, version: int, scores: Sequence[Sequence[float]]) -> Published:
    file = directory / f"v{version}.json"
    file.write_text(json.dumps(scores))
    return Published(version, f"v{version}", str(directory), "sha", str(file))


def publisher(policy: Policy, dtype: str = "float32") -> Publisher:
    return Publisher(policy, CANARY, (dtype, dtype))  # type: ignore[arg-type]


async def test_version_zero_is_the_base_and_the_trainers(tmp_path: Path) -> None:
    policy = Policy(v0=BASE)
    match = await publisher(policy).publish(trained(tmp_path, 0, BASE))
    assert (match.holds, match.tokens) == (True, 3)
    assert policy.published == [(0, Adapter("v0", str(tmp_path)))]


async def test_a_version_zero_that_is_not_the_base_is_refused(tmp_path: Path) -> None:
    other = moved(BASE, 0.1)
    with pytest.raises(JobFailure, match="does not equal the base model") as caught:
        await publisher(Policy(v0=other)).publish(trained(tmp_path, 0, other))
    assert caught.value.code == "policy_mismatch"


@pytest.mark.parametrize("served", [moved(BASE, 0.01), BASE, [[math.nan, -2.0], [-3.0]]], ids=["scale", "base", "nan"])
async def test_a_later_version_that_is_not_the_trainers_is_refused_with_figures(
    tmp_path: Path, served: Sequence[Sequence[float]]
) -> None:
    made = publisher(Policy(v0=BASE, v1=served))
    await made.publish(trained(tmp_path, 0, BASE))
    with pytest.raises(JobFailure, match="version 1 is not the trainer's") as caught:
        await made.publish(trained(tmp_path, 1, moved(BASE, 0.2)))
    assert caught.value.detail is not None
    assert caught.value.detail["holds"] is False


async def test_in_half_precision_the_band_follows_version_zero(tmp_path: Path) -> None:
    made = publisher(Policy(v0=moved(BASE, 0.06), v1=moved(BASE, 0.11), v2=moved(BASE, 0.13)), "bfloat16")
    await made.publish(trained(tmp_path, 0, BASE))
    await made.publish(trained(tmp_path, 1, BASE))
    with pytest.raises(JobFailure):
        await made.publish(trained(tmp_path, 2, BASE))
