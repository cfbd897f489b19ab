"""The rules behind a run's warnings: each looks at the numbers so far and says what is wrong, with figures.

Does not cover: where the numbers come from (`workers.series`), when a rule may speak again (`workers.monitor`). Pure; a
number that is missing or not finite never fires a rule.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from workers.series import Seen, error_kind, median_step


@dataclass(frozen=True)
class Finding:
    """`severity`: larger is worse, comparable within a rule. `suggestion` replaces the rule's own."""

    severity: float
    message: str
    data: Mapping[str, Any] = field(default_factory=dict)
    suggestion: str | None = None


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


# --- the update: does it still learn from what was sampled? ----------------------------------------------------------


def mismatch_grows(seen: Seen) -> Finding | None:
    values, at = seen.policy("mismatch_kl"), seen.at
    if len(values) < at.early + at.recent:
        return None
    first, now = seen.first("mismatch_kl"), statistics.median(values[-at.recent :])
    start = statistics.median(first)
    if now <= max(at.mismatch_floor, at.mismatch_growth * start, at.mismatch_spread * max(first)):
        return None
    times = f", {now / start:.1f} times its early median {start:.2g}" if start > 0 else ""
    text = f"Sampler and trainer drift apart: mismatch KL {now:.2g}{times}"
    return Finding(now, text, {"mismatch_kl": now, "early": start})


def mismatch_with_depth(seen: Seen) -> Finding | None:
    """Means over several steps, of turns that most of these have: the late turns of one step are few tokens."""
    at, window = seen.at, [facts.by_depth for facts in seen.steps[-seen.at.early :]]
    if not seen.last.by_depth:
        return None
    by_turn = {turn: [depths[turn] for depths in window if turn in depths] for turn in sorted(seen.last.by_depth)}
    means = [statistics.fmean(values) for values in by_turn.values() if len(values) >= at.recent]
    half = len(means) // 2
    if len(means) < 3:
        return None
    early, late = statistics.fmean(means[:half]), statistics.fmean(means[-half:])
    if late <= max(at.mismatch_floor, at.depth_growth * early):
        return None
    text = f"The mismatch of sampler and trainer grows with the turn: KL {early:.2g} in early turns, {late:.2g} in late"
    return Finding(late, text, {"by_turn": means})


def importance_out_of_range(seen: Seen) -> Finding | None:
    low, high = (seen.last.policy.get(name) for name in ("importance_p01", "importance_p99"))
    bounds = seen.at.importance_range
    if bounds is None or low is None or high is None or (low >= bounds[0] and high <= bounds[1]):
        return None
    severity = max(bounds[0] / max(low, 1e-9), high / bounds[1])
    text = (
        f"More than 1 % of the tokens became far more or less likely since they were sampled: the ratio's quantiles are"
        f" {low:.2g} (1 %) and {high:.2g} (99 %), the range is {bounds[0]:g} to {bounds[1]:g}"
    )
    return Finding(severity, text, {"importance_p01": low, "importance_p99": high})


def masked_too_much(seen: Seen) -> Finding | None:
    tokens, sequences = (seen.recent_mean(f"masked_{name}_share") for name in ("token", "sequence"))
    at = seen.at
    if tokens <= at.masked_tokens and sequences <= at.masked_sequences:
        return None
    text = f"{percent(tokens)} of the tokens and {percent(sequences)} of the sequences were kept out of the update"
    data = {"masked_token_share": tokens, "masked_sequence_share": sequences}
    return Finding(max(tokens / at.masked_tokens, sequences / at.masked_sequences), text, data)


def too_old(seen: Seen) -> Finding | None:
    """Being at the bound is what a full pipeline does; it is a fault only when it costs tokens."""
    at = seen.at
    window = seen.steps[-at.early :]
    ages = [facts.policy.get("staleness_mean", 0.0) for facts in window]
    if len(ages) < at.early or min(ages) < max(1.0, 0.9 * at.max_staleness):
        return None
    masked = max(seen.recent_mean("masked_token_share"), seen.recent_mean("masked_sequence_share"))
    if masked <= at.masked_by_age:
        return None
    text = (
        f"The batches of the last {len(ages)} steps were {ages[-1]:.1f} versions old and {percent(masked)} was masked"
    )
    return Finding(masked, text, {"staleness_mean": ages[-1], "masked_share": masked})


def entropy_collapses(seen: Seen) -> Finding | None:
    values, at = seen.policy("entropy"), seen.at
    if len(values) < 2 * at.recent:
        return None
    start, now = statistics.median(seen.first("entropy")[: at.recent]), statistics.median(values[-at.recent :])
    if now >= at.entropy_left * start:
        return None
    text = f"The entropy fell to {now:.2g} nats, {percent(now / start)} of its start {start:.2g}"
    return Finding(start / max(now, 1e-9), text, {"entropy": now, "start": start})


def entropy_jumps(seen: Seen) -> Finding | None:
    values, at = seen.policy("entropy"), seen.at
    if len(values) <= at.early:
        return None
    before, now = statistics.median(values[-at.early - 1 : -1]), values[-1]
    if now <= max(at.entropy_floor, at.entropy_jump * before):
        return None
    text = f"The entropy rose to {now:.2g} nats within a step, from a median of {before:.2g}"
    return Finding(now, text, {"entropy": now, "before": before})


def clipped_too_much(seen: Seen) -> Finding | None:
    clipped = seen.recent_mean("clip_ratio_low") + seen.recent_mean("clip_ratio_high")
    if clipped <= seen.at.clipped or len(seen.recent()) < seen.at.recent:
        return None
    text = f"{percent(clipped)} of the tokens gave no gradient because the loss clipped their ratio"
    return Finding(clipped, text, {"clip_share": clipped})


# --- the rewards: is there anything to learn, and is it the right thing? ---------------------------------------------


def few_mixed_groups(seen: Seen) -> Finding | None:
    window = [facts.groups for facts in seen.recent() if "mixed" in facts.groups]
    if len(window) < seen.at.recent or max(groups["mixed"] for groups in window) >= seen.at.mixed:
        return None
    names = ("mixed", "solved", "constant", "dropped")
    share = {name: statistics.mean(groups.get(name, 0.0) for groups in window) for name in names}
    other = share["constant"] - share["solved"]
    text = (
        f"Only {percent(share['mixed'])} of the groups of the last {len(window)} steps had rewards that differ:"
        f" {percent(share['solved'])} were solved by every rollout, {percent(other)} scored the same otherwise,"
        f" {percent(share['dropped'])} lost too many rollouts to errors"
    )
    suggestion = "Use harder rows" if share["solved"] > other else "Use easier rows or partial scores"
    return Finding(1 - share["mixed"], text, share, f"{suggestion}, or a higher compute_multiplier")


def same_score_for_all(seen: Seen) -> Finding | None:
    window = seen.steps[-2:]
    scores = [score for facts in window for score in (facts.reward_min, facts.reward_max)]
    known = [score for score in scores if score is not None]
    if len(window) < 2 or len(known) < len(scores) or max(known) - min(known) > 1e-9:
        return None
    count = sum(facts.graded for facts in window)
    return Finding(count, f"All {count:.0f} rollouts of the last two steps scored {known[0]:g}", {"score": known[0]})


def scores_without_calls(seen: Seen) -> Finding | None:
    facts, at = seen.last, seen.at
    share, reward = facts.no_calls, facts.no_calls_reward
    if share is None and facts.tool_calls is not None:  # not counted: almost no calls at all says the same
        share, reward = (1.0 if facts.tool_calls < 0.05 else 0.0), facts.reward
    if not at.uses_tools or share is None or reward is None or facts.reward is None:
        return None
    if share < at.without_calls or reward < max(at.high_score, facts.reward):
        return None
    text = f"{percent(share)} of the rollouts called no tool and scored {reward:.2f} on average, as much as the others"
    return Finding(share, text, {"share": share, "reward_mean": reward})


def validation_falls(seen: Seen) -> Finding | None:
    """Two falls in a row that together exceed their standard error, while training rewards rose."""
    if len(seen.evaluations) < 3:
        return None
    first, middle, last = seen.evaluations[-3:]
    fall = first.reward - last.reward
    if not first.reward > middle.reward > last.reward or fall <= math.hypot(first.error, last.error):
        return None
    before, after = middle.trained, last.trained
    if before is None or after is None or after <= before:
        return None
    best = max(seen.evaluations, key=lambda evaluated: evaluated.reward)
    text = (
        f"The validation reward fell twice, {first.reward:.3f} → {middle.reward:.3f} → {last.reward:.3f}, while the"
        f" training reward rose from {before:.3f} to {after:.3f}; the best was {best.reward:.3f} at step {best.step}"
    )
    return Finding(fall, text, {"best_step": best.step, "fall": fall})


# --- the rollouts: does what is around the model work? ---------------------------------------------------------------


def truncated_too_often(seen: Seen) -> Finding | None:
    graded = sum(facts.graded for facts in seen.recent())
    share = sum(facts.truncated for facts in seen.recent()) / graded if graded else 0.0
    if graded < seen.at.enough or share <= seen.at.truncated:
        return None
    text = f"{percent(share)} of {graded:.0f} rollouts were cut at a limit, which then shapes the reward"
    return Finding(share, text, {"truncated_share": share})


def rollouts_fail(seen: Seen) -> Finding | None:
    window = [facts for facts in seen.recent() if facts.started]
    shares = [sum(facts.discarded.values()) / facts.started for facts in window]
    started = sum(facts.started for facts in window)
    if started < seen.at.enough or len(shares) < seen.at.recent or min(shares) <= seen.at.errored:
        return None
    counts = sum((Counter(facts.discarded) for facts in window), Counter[str]())
    share = counts.total() / started
    states = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    example = next((f'; most often: "{facts.rejection[0]}"' for facts in reversed(window) if facts.rejection), "")
    text = f"{percent(share)} of the rollouts of the last {len(window)} steps were discarded ({states}){example}"
    return Finding(share, text, {"share": share, "states": dict(counts)})


def scores_invalid(seen: Seen) -> Finding | None:
    count = seen.last.discarded.get("invalid_score", 0)
    text = f"The grader answered {count} rollouts with something that is not a finite number; they were not trained on"
    return Finding(count, text, {"count": count}) if count else None


def rejection_repeats(seen: Seen) -> Finding | None:
    if seen.last.rejection is None:
        return None
    message, count = seen.last.rejection[0], 0
    for facts in reversed(seen.recent()):
        if facts.rejection is None or error_kind(facts.rejection[0]) != error_kind(message):
            break
        count += facts.rejection[1]
    if count < seen.at.repeated:
        return None
    return Finding(count, f'The same error {count} times: "{message}"', {"error": message, "count": count})


def tool_refuses(seen: Seen) -> Finding | None:
    calls, errors = Counter[str](), Counter[str]()
    for facts in seen.recent():
        for name, (called, failed) in facts.tools.items():
            calls[name] += round(called)
            errors[name] += round(failed)
    shares = {name: errors[name] / calls[name] for name in calls if calls[name] >= seen.at.enough}
    worst = max(shares, key=lambda name: shares[name], default=None)
    if worst is None or shares[worst] < seen.at.refused:
        return None
    text = f"`{worst}` answered {percent(shares[worst])} of {calls[worst]} calls with an error"
    return Finding(shares[worst], text, {"tool": worst, "share": shares[worst], "calls": calls[worst]})


# --- the time --------------------------------------------------------------------------------------------------------


def waits_in_line(seen: Seen) -> Finding | None:
    """At a tool's own limit, or for a slot where more slots would help; in `recent` steps in a row."""
    window = seen.recent()
    tool = min(facts.shares.get("tool_queue", 0.0) for facts in window)
    pool = min(facts.shares.get("queue", 0.0) if facts.bound == "queue" else 0.0 for facts in window)
    if len(window) < seen.at.recent or max(tool, pool) <= seen.at.queued:
        return None
    if tool >= pool:
        text = f"At least {percent(tool)} of each step was spent in line for a tool: it takes fewer calls than are made"
        return Finding(tool, text, {"tool_queue": tool})
    text = f"At least {percent(pool)} of each step was spent waiting for a rollout slot"
    return Finding(pool, text, {"queue": pool}, "Raise HONE_MAX_CONCURRENT_ROLLOUTS if tools and grader can take more")


def step_was_slow(seen: Seen) -> Finding | None:
    median, taken = median_step(seen.steps[:-1], seen.at), seen.last.seconds
    if median is None or taken is None or taken <= seen.at.slow * median:
        return None
    text = f"The step took {taken:.0f} s, {taken / median:.1f} times the median of {median:.0f} s"
    shares = {name: share for name, share in seen.last.shares.items() if share >= 0.1}
    most = max(shares, key=lambda name: shares[name], default=None)
    said = f"; {percent(shares[most])} of it: {most.replace('_', ' ')}" if most else ""
    return Finding(taken / median, text + said, {"seconds": taken, "median": median, "shares": shares})


@dataclass(frozen=True)
class Rule:
    """`check` looks at the latest step, or at the latest validation pass where `of_validation`."""

    name: str
    check: Callable[[Seen], Finding | None]
    suggestion: str
    of_validation: bool = False


RULES: tuple[Rule, ...] = (
    Rule("mismatch_grows", mismatch_grows, "Lower hone.max_staleness or the learning rate"),
    Rule(
        "mismatch_with_depth",
        mismatch_with_depth,
        "Use float32 in sampler and trainer, or shorter episodes; if it stays, report the model and its renderer",
    ),
    Rule("importance_out_of_range", importance_out_of_range, "Lower hone.max_staleness or the learning rate"),
    Rule(
        "masked_too_much", masked_too_much, "Lower hone.max_staleness or the learning rate before widening the limits"
    ),
    Rule("too_old", too_old, "Lower hone.max_staleness"),
    Rule("entropy_collapses", entropy_collapses, "Lower learning_rate_multiplier, and look for repeated answers"),
    Rule("entropy_jumps", entropy_jumps, "Lower learning_rate_multiplier; resume from the last good checkpoint"),
    Rule("clipped_too_much", clipped_too_much, "Lower learning_rate_multiplier or hone.max_staleness"),
    Rule("few_mixed_groups", few_mixed_groups, "Use rows of another difficulty or partial scores"),
    Rule("same_score_for_all", same_score_for_all, "Check that the grader reads the answer it is sent"),
    Rule("scores_without_calls", scores_without_calls, "Read a few of them: the grader may reward a shortcut"),
    Rule("validation_falls", validation_falls, "Keep the best checkpoint, and read the rollouts that score best", True),
    Rule("truncated_too_often", truncated_too_often, "Raise hone.max_tokens_per_turn or max_episode_steps"),
    Rule("rollouts_fail", rollouts_fail, "Mend the endpoint that the states name; no such rollout is trained on"),
    Rule("scores_invalid", scores_invalid, "Let the grader answer a finite number for every sample"),
    Rule("rejection_repeats", rejection_repeats, "Mend the endpoint, or cancel: repeating it will not help"),
    Rule("tool_refuses", tool_refuses, "Read the replies: either the tool is broken or its schema misleads the model"),
    Rule("waits_in_line", waits_in_line, "Let the tool take more calls at once"),
    Rule("step_was_slow", step_was_slow, "See the event's shares for the phase that grew"),
)


def check(seen: Seen, *, of_validation: bool) -> Iterator[tuple[Rule, Finding]]:
    """The rules that have something to say about the latest step, or about the latest validation pass."""
    for rule in RULES:
        if rule.of_validation is of_validation and (finding := rule.check(seen)) is not None:
            yield rule, finding
