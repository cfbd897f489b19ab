"""Numbers of a step, under the names that scripts know."""

from __future__ import annotations

from array import array

import pytest

from app.core.states import RolloutState
from tests.unit.rollouts.scripted import ended, row
from workers.rollouts import metrics
from workers.rollouts.batch import judge
from workers.rollouts.pool import StepRollouts
from workers.rollouts.types import Group, StopReason, ToolRecord


def test_discarded_rollouts_are_counted_and_never_averaged() -> None:
    members = [ended(1.0), ended(0.0, sample=1), ended(None, sample=2, state=RolloutState.TOOL_FAILED)]
    facts = metrics.summary(members)
    assert (facts["n"], facts["discarded"], facts["reward_mean"]) == (2, 1, 0.5)
    assert (facts["reward_std"], facts["reward_se"]) == (0.5, pytest.approx(0.5))


def test_nothing_measured_is_none_and_not_zero() -> None:
    facts = metrics.summary([])
    assert (facts["n"], facts["reward_mean"], facts["reward_se"], facts["completion_tokens_mean"]) == (
        0,
        None,
        None,
        None,
    )


@pytest.mark.parametrize(("share", "value"), [(0.5, 2), (0.95, 4), (0.1, 1), (1.0, 4)])
def test_quantiles_are_nearest_rank(share: float, value: float) -> None:
    assert metrics.quantile([4, 1, 3, 2], share) == value
    assert metrics.quantile([], share) is None


def test_tools_are_told_apart() -> None:
    def record(name: str, seconds: float, attempts: int = 1, *, is_error: bool = False) -> ToolRecord:
        return ToolRecord("c", name, "{}", "x", 200, attempts, seconds, is_error)

    one = ended(1.0, trajectory={"tools": [record("b", 1.0), record("a", 2.0, 3), record("a", 4.0, is_error=True)]})
    a, b = metrics.tools([one, ended(0.0, sample=1)], "train")
    assert (a["name"], a["train_calls_per_rollout"], a["errors_count"], a["retries_count"]) == ("a", 1.0, 1, 2)
    assert (a["latency_p50_s"], a["latency_p95_s"], b["latency_p50_s"]) == (2.0, 4.0, 1.0)


def found(groups: list[Group]) -> StepRollouts:
    judged = [(group, judge(group, 2)) for group in groups]
    return StepRollouts(step=3, version=0, groups=judged, positions=[], wall_s=1.0)


def test_new_roots_and_drifted_rollouts_are_counted() -> None:
    afresh, drifted = ended(1.0), ended(None, sample=1, state=RolloutState.SAMPLER_FAILED)
    afresh.trajectory.tree.restart(array("i", [9, 9]))
    afresh.trajectory.bridge_breaks, drifted.trajectory.drifted = 2, True
    shown = metrics.step_data(3, 10, found([Group(row(), 1, 0, [afresh, drifted])]))["rollouts"]
    assert (shown["new_roots"], shown["bridge_breaks"], shown["token_drift"]) == (1, 2, 1)


def test_a_steps_data_says_what_its_groups_were_worth() -> None:
    groups = [
        Group(row(), 1, 0, [ended(1.0), ended(0.0, sample=1, trajectory={"stop_reason": StopReason.LENGTH})]),
        Group(row(), 2, 0, [ended(1.0, group=2), ended(1.0, group=2, sample=1)]),
        Group(row(), 3, 0, [ended(1.0, group=3), ended(None, group=3, sample=1, state=RolloutState.GRADER_FAILED)]),
        Group(row(), 4, 0, [ended(0.0, group=4), ended(0.0, group=4, sample=1)]),
    ]
    data = metrics.step_data(3, 10, found(groups))
    assert data["groups"] == {"size": 2, "total": 4, "mixed": 0.25, "solved": 0.25, "constant": 0.5, "dropped": 0.25}
    assert (data["rollouts"]["started"], data["rollouts"]["graded"], data["rollouts"]["truncated"]) == (8, 7, 1)
    assert data["rollouts"]["discarded"] == {"grader_failed": 1}
    assert data["train_mean_reward"] == pytest.approx(4 / 7)
    assert data["mean_unresponsive_rewards"] == 1 / 8


def test_the_message_is_the_one_that_scripts_read() -> None:
    data = {"step": 3, "total_steps": 10, "train_mean_reward": 0.5}
    assert metrics.message(data) == "Step 3/10 , train mean reward=0.5000"
    both = metrics.message({**data, "full_valid_mean_reward": 0.25, "full_valid_mean_parse_error": 0.125})
    assert both == (
        "Step 3/10 , train mean reward=0.5000, full validation mean reward=0.2500,"
        " full validation mean parse error=0.1250"
    )
