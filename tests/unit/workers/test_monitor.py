"""Every rule fires on a run that has its fault, and none on a healthy one; a warning is not repeated without need."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workers.callouts import RULES
from workers.monitor import Monitor, no_signal, top_error
from workers.series import Thresholds

Change = Callable[[int], dict[str, Any]]  # step → dotted path: value


def step_data(step: int, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A healthy step, with a little noise, as the metrics event holds it."""
    wave = math.sin(step)
    data: dict[str, Any] = {
        "step": step,
        "total_steps": 100,
        "train_mean_reward": 0.3 + 0.004 * step + 0.02 * wave,
        "tool_calls_mean": 1.8,
        "reward": {"min": 0.0, "max": 1.0},
        "groups": {"mixed": 0.6 + 0.1 * wave, "solved": 0.1, "constant": 0.3, "dropped": 0.0},
        "rollouts": {
            "started": 64,
            "graded": 63,
            "truncated": 3,
            "discarded": {"tool_failed": 1},
            "no_calls": {"share": 0.05, "reward_mean": 0.1},
            "top_error": None,
        },
        "tools": [{"name": "search", "train_calls_per_rollout": 1.8, "errors_count": 4}],
        "policy": {
            "mismatch_kl": 3e-4 * (1 + 0.3 * wave),
            "mismatch_kl_depth_0": 3e-4,
            "mismatch_kl_depth_1": 3e-4 * (1 + 0.5 * wave),
            "mismatch_kl_depth_2": 4e-4,
            "importance_p01": 0.8,
            "importance_p99": 1.25,
            "masked_token_share": 0.002,
            "masked_sequence_share": 0.0,
            "clip_ratio_low": 0.005,
            "clip_ratio_high": 0.005,
            "entropy": 0.9 - 0.003 * step,
            "staleness_mean": 1.0,
        },
        "timing": {"step": {"full_iteration": 80 + 10 * wave}},
        "diagnosis": {"bound": "tool", "shares": {"sampling": 0.3, "tools": 0.5, "queue": 0.1, "tool_queue": 0.1}},
    }
    for path, value in (changes or {}).items():
        *parents, name = path.split(".")
        where = data
        for parent in parents:
            where = where[parent]
        where[name] = value
    return data


def validation(step: int, reward: float | None, error: float = 0.01) -> dict[str, Any]:
    return {**step_data(step), "full_valid_mean_reward": reward, "valid": {"sampled": {"reward_se": error}}}


def steps(change: Change, until: int = 12) -> list[dict[str, Any]]:
    return [step_data(step, change(step)) for step in range(1, until + 1)]


def falling(rewards: tuple[float, ...]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for number, reward in enumerate(rewards):
        found += [step_data(4 * number + i, {"train_mean_reward": 0.3 + 0.1 * number}) for i in range(1, 4)]
        found.append(validation(4 * number + 3, reward))
    return found


# rule → a run with its fault, words of the warning
FAULTS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "mismatch_grows": (steps(lambda s: {"policy.mismatch_kl": 3e-4 if s < 9 else 2e-3}), "6.7 times its early median"),
    "mismatch_with_depth": (
        steps(lambda s: {"policy.mismatch_kl_depth_2": 5e-3, "policy.mismatch_kl_depth_3": 6e-3}),
        "KL 0.0003",
    ),
    "importance_out_of_range": (steps(lambda s: {"policy.importance_p99": 2.3 if s == 12 else 1.2}), "2.3 (99 %)"),
    "masked_too_much": (steps(lambda s: {"policy.masked_sequence_share": 0.15}), "15 % of the sequences"),
    "too_old": (steps(lambda s: {"policy.masked_token_share": 0.03}), "1.0 versions old and 3.0 %"),
    "entropy_collapses": (steps(lambda s: {"policy.entropy": 0.9 if s < 7 else 0.3}), "33 % of its start"),
    "entropy_jumps": (steps(lambda s: {"policy.entropy": 0.9 if s < 12 else 2.0}), "rose to 2 nats"),
    "clipped_too_much": (steps(lambda s: {"policy.clip_ratio_high": 0.2}), "21 % of the tokens"),
    "few_mixed_groups": (
        steps(lambda s: {"groups": {"mixed": 0.1, "solved": 0.8, "constant": 0.9, "dropped": 0.0}}),
        "80 % were solved by every rollout",
    ),
    "same_score_for_all": (
        steps(lambda s: {"reward": {"min": 0.5, "max": 0.5} if s > 4 else {"min": 0, "max": 1}}),
        "All 126 rollouts of the last two steps scored 0.5",
    ),
    "scores_without_calls": (
        steps(lambda s: {"rollouts.no_calls": {"share": 0.4, "reward_mean": 0.9}}),
        "40 % of the rollouts called no tool",
    ),
    "validation_falls": (falling((0.5, 0.6, 0.5, 0.4)), "the best was 0.600 at step 7"),
    "truncated_too_often": (steps(lambda s: {"rollouts.truncated": 12}), "19 % of"),
    "rollouts_fail": (
        steps(lambda s: {"rollouts.discarded": {"tool_failed": 6, "grader_failed": 1}}),
        "18 tool_failed, 3 grader_failed",
    ),
    "scores_invalid": (steps(lambda s: {"rollouts.discarded": {"invalid_score": 2} if s == 9 else {}}), "2 rollouts"),
    "rejection_repeats": (
        steps(lambda s: {"rollouts.top_error": {"message": f"tool a{s}: 403 Forbidden", "count": 8}}),
        "The same error 24 times",
    ),
    "tool_refuses": (
        steps(lambda s: {"tools": [{"name": "search", "train_calls_per_rollout": 1.0, "errors_count": 60}]}),
        "`search` answered 95 % of 63 calls",
    ),
    "waits_in_line": (steps(lambda s: {"diagnosis.shares": {"tool_queue": 0.4}}), "40 % of each step"),
    "step_was_slow": (steps(lambda s: {"timing.step.full_iteration": 340 if s == 12 else 80}), "4.2 times the median"),
}


def raised(history: list[dict[str, Any]], thresholds: Thresholds | None = None) -> list[tuple[int, str, str]]:
    monitor = Monitor((), thresholds) if thresholds else Monitor()
    return [(data["step"], out.rule, out.message) for data in history for out in monitor.observe(data)]


@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_each_rule_finds_its_fault_says_the_figures_and_a_way_out(rule: str) -> None:
    history, words = FAULTS[rule]
    monitor = Monitor()
    found = [out for data in history for out in monitor.observe(data) if out.rule == rule]
    assert found
    assert words in found[0].message
    assert found[0].suggestion
    json.dumps(found[0].data, allow_nan=False)


@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_a_fault_raises_no_rule_that_is_not_about_it(rule: str) -> None:
    related = {"too_old": {"masked_too_much"}, "masked_too_much": {"too_old"}}
    assert {name for _, name, _ in raised(FAULTS[rule][0])} - {rule} <= related.get(rule, set())


def test_a_healthy_run_is_silent() -> None:
    history = [step_data(step) for step in range(1, 101)]
    for at, reward in ((100, 0.52), (60, 0.5), (30, 0.45), (10, 0.4)):
        history.insert(at, validation(at, reward))
    history.insert(0, {"step": 0, "full_valid_mean_reward": 0.3, "valid": {"sampled": {"reward_se": None}}})
    assert raised(history) == []


def test_steps_that_measured_nothing_are_silent() -> None:
    bare: list[dict[str, Any]] = [
        {"step": step, "total_steps": 9, "groups": None, "policy": {}} for step in range(1, 10)
    ]
    broken = [step_data(step, {"policy.mismatch_kl": math.nan, "policy.entropy": None}) for step in range(10, 30)]
    assert raised([*bare, *broken, validation(30, None)]) == []


def test_what_lasts_is_said_again_ever_more_rarely() -> None:
    lasting = steps(lambda s: {"rollouts.truncated": 12}, 40)
    assert [step for step, _, _ in raised(lasting)] == [1, 6, 16, 36]


def test_what_got_much_worse_is_said_at_once() -> None:
    worse = steps(lambda s: {"rollouts.truncated": 12 if s < 4 else 60}, 5)
    assert [step for step, _, _ in raised(worse)] == [1, 4, 5]


def test_what_went_away_and_came_back_is_new() -> None:
    twice = steps(lambda s: {"rollouts.discarded": {"invalid_score": 1} if s in (2, 9, 15) else {}}, 20)
    assert [step for step, _, _ in raised(twice)] == [2, 9, 15]


def test_a_resumed_monitor_goes_on_as_if_it_had_never_stopped() -> None:
    history = steps(lambda s: {"rollouts.truncated": 12, "policy.entropy": 0.9 if s < 10 else 0.3}, 40)
    whole = raised(history)
    for cut in (1, 5, 20):
        resumed = Monitor(json.loads(json.dumps(history[:cut])))
        rest = [(data["step"], out.rule, out.message) for data in history[cut:] for out in resumed.observe(data)]
        assert rest == [entry for entry in whole if entry[0] > cut]


def test_either_kind_of_mask_is_too_much_on_its_own() -> None:
    tokens = steps(lambda s: {"policy.masked_token_share": 0.06, "policy.staleness_mean": 0.0})
    assert {rule for _, rule, _ in raised(tokens)} == {"masked_too_much"}


def test_tokens_that_became_unlikely_are_out_of_range_too() -> None:
    unlikely = steps(lambda s: {"policy.importance_p01": 0.3})
    assert {rule for _, rule, _ in raised(unlikely)} == {"importance_out_of_range"}


def test_growth_within_the_noise_of_the_arithmetic_is_silent() -> None:
    def tiny(step: int) -> dict[str, Any]:
        depths = {f"policy.mismatch_kl_depth_{depth}": 1e-7 * 10**depth for depth in range(3)}
        early = step < 8
        return {"policy.mismatch_kl": 1e-8 if early else 5e-6, "policy.entropy": 1e-3 if early else 1e-2, **depths}

    assert raised(steps(tiny)) == []


def test_a_mismatch_that_jumps_about_as_bf16_does_has_not_grown() -> None:
    def noisy(step: int) -> dict[str, Any]:
        return {"policy.mismatch_kl": (1e-3, 3e-3, 1e-3)[step % 3] if step < 9 else 4e-3}

    assert raised(steps(noisy)) == []


def test_a_few_odd_late_turns_are_not_a_mismatch_that_grows_with_depth() -> None:
    odd = steps(
        lambda s: {"policy.mismatch_kl_depth_4": 0.05, "policy.mismatch_kl_depth_5": 0.05} if s % 4 == 0 else {}
    )
    assert raised(odd) == []


def test_a_share_of_a_handful_says_nothing() -> None:
    few = {"rollouts.started": 4, "rollouts.graded": 3, "rollouts.truncated": 2}
    assert raised(steps(lambda s: {**few, "rollouts.discarded": {"tool_failed": 1}}, 4)) == []


def test_one_bad_step_is_not_a_sustained_fault() -> None:
    burst = steps(lambda s: {"rollouts.discarded": {"tool_failed": 30} if s == 6 else {}})
    assert raised(burst) == []


def test_a_fall_within_the_error_of_validation_is_noise() -> None:
    noisy = falling((0.5, 0.49, 0.48))
    assert raised(noisy)
    for data in noisy:
        if "valid" in data:
            data["valid"]["sampled"]["reward_se"] = 0.05
    assert raised(noisy) == []


def test_limits_of_the_plan_are_the_monitors() -> None:
    history, _ = FAULTS["importance_out_of_range"]
    assert raised(history, Thresholds(importance_range=(0.2, 5.0))) == []
    assert raised(history, Thresholds(importance_range=None)) == []
    assert raised(FAULTS["scores_without_calls"][0], Thresholds(uses_tools=False)) == []


def test_hardly_any_calls_and_high_scores_are_seen_without_a_count_of_them() -> None:
    quiet = {"rollouts.no_calls": None, "tool_calls_mean": 0.01, "train_mean_reward": 0.8}
    assert [rule for _, rule, _ in raised(steps(lambda s: quiet, 1))] == ["scores_without_calls"]


def test_a_step_that_does_not_end_is_called_overdue_once() -> None:
    monitor = Monitor(steps(lambda s: {"timing.step.full_iteration": 80.0}))
    assert monitor.overdue(200.0, "waiting for tool search") is None
    found = monitor.overdue(250.0, "waiting for tool search")
    assert found is not None
    assert found.message == "No step finished for 250 s, the median is 80 s; now waiting for tool search"
    assert monitor.overdue(300.0, "waiting for tool search") is None
    monitor.observe(step_data(13))
    assert monitor.overdue(250.0, "training") is not None


@pytest.mark.parametrize(
    ("rewards", "constant", "kind", "words"),
    [
        ([1.0, 1.0], 2, "too easy", "2 of 4 groups gave every rollout the same reward (1) and 2 of 4 groups lost"),
        ([0.0], 4, "too hard", "4 of 4 groups gave every rollout the same reward (0); use easier rows"),
        ([0.0, 1.0], 4, "too easy or too hard", "(0, 1)"),
        ([0.5], 4, "constant grader", "check that the grader reads the answer"),
        ([0.2, 0.5, 0.7], 3, "no spread", "the answers of a row differ"),
        ([], 0, "errors", "4 of 4 groups lost too many rollouts to errors; mend"),
    ],
)
def test_a_step_without_signal_says_why(rewards: list[float], constant: int, kind: str, words: str) -> None:
    found = no_signal(rewards, groups=4, constant=constant)
    assert found.kind == kind
    assert words in found.sentence


def test_the_most_frequent_error_is_counted_over_ids_and_times() -> None:
    errors = ["search: 503 after 2.1 s (tr_9a)", None, "grader: timeout", "search: 503 after 4.0 s (tr_77)"]
    assert top_error(errors) == {"message": "search: 503 after 2.1 s (tr_9a)", "count": 2}
    assert top_error([None]) is None


def test_every_rule_is_explained_to_people() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [rule.name for rule in RULES if f"`{rule.name}`" not in text] == []
