"""The short form of the storm, and of a run that must be found out: for CI. The long one is `make chaos`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.chaos.mutations import TELLTALES, mutated
from tests.chaos.storm import Plan, storm
from tests.postgres import NoPostgres

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_storm_loses_nothing_and_does_nothing_twice(database: str, tmp_path: Path) -> None:
    try:
        outcome = asyncio.run(storm(Plan(database, jobs=4, faults=15, seed=3), tmp_path))
    except NoPostgres as reason:
        pytest.skip(str(reason))
    assert outcome.green, (outcome.line(), outcome.verdict.faults, outcome.orphans)
    assert sum(outcome.hit.values()) >= 15


def test_a_storm_without_the_fence_is_found_out(tmp_path: Path) -> None:
    outcome = asyncio.run(storm(mutated(Plan("sqlite", jobs=3, faults=5, seed=3), "fence"), tmp_path))

    assert not outcome.green
    assert any(outcome.verdict.figures[name] for name in TELLTALES["fence"]), outcome.line()
