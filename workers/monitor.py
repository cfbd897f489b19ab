"""Watch a run's numbers and raise a warning, with a way out, when a rule finds something wrong.

Does not cover: the rules themselves (`workers.callouts`), where the time went (`workers.diagnosis`), writing the event.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from workers.callouts import Finding, check
from workers.series import Evaluated, Facts, Seen, Thresholds, error_kind, median_step, number

COOL_DOWN = 5  # steps of silence after a warning; doubled each time it is repeated
DEFAULTS = Thresholds()
WINDOW = 50  # steps that rules look back at
WORSE = 1.5  # times the severity it was last raised with: said at once


@dataclass(frozen=True)
class Callout:
    """A warning: what is wrong, with figures, and what to do about it."""

    rule: str
    message: str
    suggestion: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class _Raised:
    """The last time that a rule spoke, and the last time that it had something to say."""

    step: int
    severity: float
    times: int
    seen: int


class Monitor:
    """One per attempt. `history`: data of the earlier metrics events, oldest first; nothing is raised for them, but
    what was said then is not said again."""

    def __init__(self, history: Iterable[Mapping[str, Any]] = (), thresholds: Thresholds = DEFAULTS) -> None:
        self._at = thresholds
        self._start: list[Facts] = []
        self._steps: deque[Facts] = deque(maxlen=WINDOW)
        self._rewards: list[float] = []  # of training, since the last validation pass
        self._evaluations: list[Evaluated] = []
        self._raised: dict[str, _Raised] = {}
        self._overdue = -1  # the last finished step after which the next was called overdue
        for data in history:
            self.observe(data)

    def observe(self, data: Mapping[str, Any]) -> list[Callout]:
        """Look at the data of a finished step, or of a validation pass (it has `valid`), which repeats its step's."""
        of_validation = "valid" in data
        if of_validation and not self._evaluated(data):
            return []
        if not of_validation:
            self._stepped(Facts.of(data))
        seen = Seen(self._start, list(self._steps), self._evaluations, self._at)
        return [
            Callout(rule.name, finding.message, finding.suggestion or rule.suggestion, finding.data)
            for rule, finding in check(seen, of_validation=of_validation)
            if self._speaks(rule.name, int(data["step"]), finding)
        ]

    def _stepped(self, facts: Facts) -> None:
        self._steps.append(facts)
        if facts.policy and len(self._start) < self._at.early:
            self._start.append(facts)
        if facts.reward is not None:
            self._rewards.append(facts.reward)

    def _evaluated(self, data: Mapping[str, Any]) -> bool:
        """False for a pass that measured nothing."""
        reward = number(data, "full_valid_mean_reward")
        if reward is None:
            return False
        error = number(data, "valid", "sampled", "reward_se") or 0.0
        trained = statistics.fmean(self._rewards) if self._rewards else None
        self._evaluations.append(Evaluated(int(data["step"]), reward, error, trained))
        self._rewards.clear()
        return True

    def overdue(self, elapsed_s: float, waiting_for: str) -> Callout | None:
        """Has no step finished for several times the median? Asked while one runs; says so once a step."""
        median = median_step(list(self._steps), self._at)
        last = self._steps[-1].step if self._steps else 0
        if median is None or elapsed_s <= self._at.slow * median or self._overdue == last:
            return None
        self._overdue = last
        message = f"No step finished for {elapsed_s:.0f} s, the median is {median:.0f} s; now {waiting_for}"
        data = {"seconds": elapsed_s, "median": median, "waiting_for": waiting_for}
        return Callout("step_overdue", message, "Look at the endpoint or process that it waits for", data)

    def _speaks(self, rule: str, step: int, finding: Finding) -> bool:
        before = self._raised.get(rule)
        if before is None or step - before.seen > COOL_DOWN:  # new, or it had gone away
            self._raised[rule] = _Raised(step, finding.severity, 1, step)
            return True
        quiet = COOL_DOWN * 2 ** (before.times - 1)
        speaks = step - before.step >= quiet or finding.severity >= WORSE * before.severity
        self._raised[rule] = (
            _Raised(step, finding.severity, before.times + 1, step)
            if speaks
            else _Raised(before.step, before.severity, before.times, step)
        )
        return speaks


class Cause(StrEnum):
    """Why a step's groups teach nothing."""

    TOO_EASY = "too easy"  # every rollout has full marks
    TOO_HARD = "too hard"  # every rollout has nothing
    DECIDED = "too easy or too hard"  # some rows always succeed, the others never
    CONSTANT = "constant grader"  # one score between, whatever the answer
    NO_SPREAD = "no spread"  # scores differ from row to row and never within one
    DROPPED = "errors"  # too few rollouts of a group survived


@dataclass(frozen=True)
class NoSignal:
    """`kind`: the cause in a few words; `sentence`: the figures and what to do."""

    kind: Cause
    sentence: str


_MEND = {
    Cause.TOO_EASY: "use harder rows or a stricter grader",
    Cause.TOO_HARD: "use easier rows, partial scores or worked examples in the prompt",
    Cause.DECIDED: "use rows between the two, partial scores, or a higher compute_multiplier",
    Cause.CONSTANT: "check that the grader reads the answer it is sent",
    Cause.NO_SPREAD: "check that the grader depends on the answer, and that the answers of a row differ",
    Cause.DROPPED: "mend the endpoint that the rollouts' states name",
}


def no_signal(rewards: Sequence[float], *, groups: int, constant: int, full_marks: float = 1.0) -> NoSignal:
    """Why none of a step's `groups` taught anything; `constant` of them gave all their rollouts one reward.

    `rewards`: those rewards, repeated or not. The rest of the groups was dropped for errors.
    """
    distinct = sorted(set(rewards))
    if not distinct:
        kind = Cause.DROPPED
    elif distinct[0] >= full_marks:
        kind = Cause.TOO_EASY
    elif distinct == [0.0]:
        kind = Cause.TOO_HARD
    elif all(reward in (0.0, full_marks) for reward in distinct):
        kind = Cause.DECIDED
    else:
        kind = Cause.CONSTANT if len(distinct) == 1 else Cause.NO_SPREAD
    shown = ", ".join(f"{reward:g}" for reward in distinct[:5]) + (", …" if len(distinct) > 5 else "")
    same = f"{constant} of {groups} groups gave every rollout the same reward ({shown})" if constant else ""
    rest = groups - constant
    lost = f"{rest} of {groups} groups lost too many rollouts to errors" if rest > 0 else ""
    return NoSignal(kind, f"{' and '.join(filter(None, (same, lost)))}; {_MEND[kind]}")


def top_error(errors: Iterable[str | None]) -> dict[str, Any] | None:
    """The most frequent error of a step's rollouts as {"message", "count"}; numbers and ids in it do not tell apart."""
    found = [error for error in errors if error]
    if not found:
        return None
    kinds = Counter(error_kind(error) for error in found)
    kind, count = kinds.most_common(1)[0]
    return {"message": next(error for error in found if error_kind(error) == kind)[:300], "count": count}
