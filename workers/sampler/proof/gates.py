"""The three gates as arithmetic over canary log-probs: A how near, B which side of the step, C whether anything moved.

v: the sampler's scores of version N; t_N: the trainer's. Gate A sees a wrong, broken or mis-scaled policy; B tells N
from an older version where the step is larger than the noise of the precision; C sees a change, not its direction.
Does not cover: where the scores come from (`canary`), nor which gates a version must pass (`evidence`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Scores = Sequence[Sequence[float]]  # per canary sequence, from position 1 on

RESOLVABLE_SD = 0.15  # of the step; the middle between the two versions is more than three of them away
BEHIND = -0.25  # half-way from the middle to the older version, which is served at -0.5
SURE = 3.0  # standard deviations that a failure must lie behind the middle
BEYOND = 6.0  # standard deviations past the new version that make it another policy altogether
UNEVEN = 6.0  # times the base's noise that a step's own may show: tokens that move most are also the least certain
STRAYS = 0.01  # of the tokens may be far off in half precision: those of tiny probability move by a nat
STILL = 1e-5  # nats; what the trainer's scores must differ by before equal answers of a sampler say anything


class Verdict(StrEnum):
    HOLDS = "holds"
    FAILS = "fails"
    NOT_RESOLVABLE = "not_resolvable"  # below the noise of the precision: neither a pass nor a failure
    NOT_TAKEN = "not_taken"  # the engine was not idle, or there is nothing to compare with


@dataclass(frozen=True)
class Bands:
    """Limits of gate A: mean |v - t| and k3, both in nats a token."""

    mean_abs: float
    k3: float


EXACT = Bands(1e-3, 1e-5)  # fp32 on both sides; seen correct: 1e-5 and 4e-9
UNCALIBRATED = Bands(0.08, 8e-3)  # seen correct: up to 0.056 and 4.5e-3
WIDEST = Bands(0.3, 0.1)  # for the base itself; another model is nats away, a model of wide logits 0.1 in bf16
NARROWEST = Bands(0.04, 2e-3)  # half of what one model needed: noise grows a little as a policy sharpens


@dataclass(frozen=True)
class Match:
    """Gate A. `k3`: mean of exp(d) - 1 - d, d = sampler - trainer. `rms` is the noise that gate B is weighed by.

    `k3_core`: without the worst `STRAYS`. The canary's text was not sampled from the policy, so its k3 is no estimate
    of a divergence but a sum of squares with a heavy tail: one token of 382 that bf16 moved by 1.2 nats was 44 % of it
    and paused a right version of the demo (docs/decisions/008). Only what is exact has no such excuse.
    """

    tokens: int
    mean_abs: float
    max_abs: float
    rms: float
    k3: float
    k3_core: float
    bands: Bands

    @property
    def holds(self) -> bool:
        finite = math.isfinite(self.mean_abs) and math.isfinite(self.k3)
        return finite and self.mean_abs <= self.bands.mean_abs and self._judged <= self.bands.k3

    @property
    def _judged(self) -> float:
        return self.k3 if self.bands is EXACT else self.k3_core

    @property
    def sentence(self) -> str:
        without = "" if self.bands is EXACT else f" without its worst {_strays(self.tokens)}"
        return (
            f"mean |difference| {self.mean_abs:.4g} (limit {self.bands.mean_abs:.4g}), k3{without} {self._judged:.3g} "
            f"(limit {self.bands.k3:.3g}) over {self.tokens} tokens"
        )

    def as_dict(self) -> dict[str, Any]:
        """For an event: JSON has no NaN, and neither has PostgreSQL's; such a figure is None."""
        return {
            "verdict": str(Verdict.HOLDS if self.holds else Verdict.FAILS),
            "tokens": self.tokens,
            "mean_abs": finite(self.mean_abs),
            "max_abs": finite(self.max_abs),
            "k3": finite(self.k3),
            "k3_core": finite(self.k3_core),
            "limit_mean_abs": self.bands.mean_abs,
            "limit_k3": self.bands.k3,
        }


@dataclass(frozen=True)
class Noise:
    """Root mean squares in nats a token: of sampler against trainer, and the trainer's own part of it."""

    together: float
    trainer: float


@dataclass(frozen=True)
class Projection:
    """Gate B against one older version: +0.5 when N is served, -0.5 when the older one is, give or take `noise_sd`.

    None: the scores of the two differ by no more than the trainer's own noise.
    """

    against: int
    projection: float | None
    noise_sd: float | None
    step_mean_abs: float
    step_max_abs: float
    refuted: bool = False  # by gate C: whatever is served, it is not the older version

    @property
    def verdict(self) -> Verdict:
        """Nearer to N holds; surely nearer to the older one, or far beyond N, fails; in between nothing was resolved.

        Half precision swallows what a step adds below half of a unit in the last place, so that a right version may
        stand well behind +0.5: +0.05 was seen with an sd of 0.04, -0.31 with one of 0.17 (docs/decisions/008).
        """
        p, sd = self.projection, self.noise_sd
        if p is None or sd is None or sd > RESOLVABLE_SD:
            return Verdict.NOT_RESOLVABLE
        if p > max(1.0, 0.5 + BEYOND * sd) or (self.behind and not self.refuted):
            return Verdict.FAILS
        return Verdict.HOLDS if p > 0 else Verdict.NOT_RESOLVABLE

    @property
    def behind(self) -> bool:
        """Surely nearer to the older version."""
        p, sd = self.projection, self.noise_sd
        return p is not None and sd is not None and p <= BEHIND and p + SURE * sd < 0

    @property
    def sentence(self) -> str:
        if self.projection is None:
            return f"the trainer's own scores do not tell it from version {self.against}"
        return (
            f"projection {self.projection:+.3g} against version {self.against}, noise {self.noise_sd:.2g} of the step"
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "verdict": str(self.verdict),
            "against": self.against,
            "projection": self.projection,
            "noise_sd": self.noise_sd,
            "step_mean_abs": self.step_mean_abs,
            "step_max_abs": self.step_max_abs,
        }


@dataclass(frozen=True)
class Fingerprint:
    """Gate C: the exact scores of an idle engine; `same_as` is the name whose scores they equal to the last bit."""

    verdict: Verdict
    reason: str = ""
    same_as: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"verdict": str(self.verdict), "reason": self.reason or None, "same_as": self.same_as}


@dataclass(frozen=True)
class Taken:
    """One policy as an idle engine scored it, and as the trainer did where that is known."""

    served: Scores
    trained: Scores | None


def compare(served: Scores, trained: Scores, bands: Bands) -> Match:
    """Gate A. Raises ValueError when the two are not of one shape, which is our bug."""
    d = [a - b for a, b in zip(flat(served, trained), flat(trained, served), strict=True)]
    k3 = sorted(map(_k3, d))
    return Match(
        tokens=len(d),
        mean_abs=math.fsum(map(abs, d)) / len(d),
        max_abs=max(map(abs, d)),
        rms=math.sqrt(math.fsum(x * x for x in d) / len(d)),
        k3=math.fsum(k3) / len(d),
        k3_core=math.fsum(k3[: len(d) - _strays(len(d))]) / len(d),
        bands=bands,
    )


def bands_for(sampler_dtype: str, trainer_dtype: str, base: Match | None) -> Bands:
    """What this model on this sampler may differ by: twice its base's own mean, and four times its k3 (a square)."""
    if sampler_dtype == trainer_dtype == "float32":
        return EXACT
    if base is None:
        return UNCALIBRATED
    return Bands(max(NARROWEST.mean_abs, 2 * base.mean_abs), max(NARROWEST.k3, 4 * base.k3))


def noise_of(base: Match, sampler_dtype: str, trainer_dtype: str) -> Noise:
    """Who makes the noise: fp32 makes none, two of one precision half of the square each."""
    if trainer_dtype == "float32":
        return Noise(base.rms, 0.0)
    return Noise(base.rms, base.rms if sampler_dtype == "float32" else base.rms / math.sqrt(2))


def project(
    served: Scores, trained: Scores, older: Scores, *, against: int, noise: Noise | None = None, exact: bool = True
) -> Projection:
    """Gate B: p, the slope of v - (t_N + t_M) / 2 on d = t_N - t_M.

    Its sd is the slope's standard error that allows every token its own noise (HC3: MacKinnon & White 1985), because
    the tokens that a step moves most are the ones that rounding moves most, too; one rms for all read a right version
    as +1.08 with an sd of 0.14. `noise` is the base's on this sampler: the sd lies between what that gives and
    `UNEVEN` times as much, or another policy would hide behind the distance that it makes itself.

    A trainer with noise of its own puts it into d twice: only the rest of d² is the step, p is half of that share, and
    both p and sd are given in units of the step. Without `noise`, `exact` says whether the trainer's scores have none.
    """
    v, t, m = flat(served, trained), flat(trained, served), flat(older, served)
    d = [a - b for a, b in zip(t, m, strict=True)]
    squares = math.fsum(x * x for x in d)
    step = (math.fsum(map(abs, d)) / len(d), max(map(abs, d)))
    rms = math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(v, t, strict=True)) / len(v))  # seen here, now
    of_trainer = noise.trainer if noise is not None else 0.0 if exact else rms
    share = 1 - 2 * len(d) * of_trainer**2 / squares if squares else 0.0
    if share <= 0 or not all(map(math.isfinite, v)):
        return Projection(against, None, None, *step)
    middle = [(a + b) / 2 for a, b in zip(t, m, strict=True)]
    p = math.fsum((a - b) * x for a, b, x in zip(v, middle, d, strict=True)) / squares
    left = [a - b - p * x for a, b, x in zip(v, middle, d, strict=True)]
    scores = (e * x / max(1e-9, 1 - x * x / squares) for e, x in zip(left, d, strict=True))
    sd = math.sqrt(math.fsum(each * each for each in scores)) / squares
    if noise is not None:
        even = noise.together / math.sqrt(squares)
        sd = max(even, min(sd, UNEVEN * even))
    return Projection(against, p / share, sd / share, *step)


def fingerprint(mine: Taken, earlier: Mapping[str, Taken], *, must_hold: str | None) -> Fingerprint:
    """Gate C. `earlier`: by served name; `must_hold`: that of the version before, without which nothing is proved."""
    for name, other in earlier.items():
        if list(map(list, mine.served)) != list(map(list, other.served)):
            continue
        if mine.trained is None or other.trained is None:
            reason = f"the trainer's scores of {name} are not known"
            return Fingerprint(Verdict.NOT_RESOLVABLE, reason, name)
        moved = max(
            abs(a - b)
            for a, b in zip(flat(mine.trained, other.trained), flat(other.trained, mine.trained), strict=True)
        )
        if moved < STILL:
            return Fingerprint(Verdict.NOT_RESOLVABLE, f"the trainer moved the canary by {moved:.1e} only", name)
        return Fingerprint(Verdict.FAILS, f"the sampler answers exactly as it does for {name}", name)
    if must_hold is not None and must_hold not in earlier:
        return Fingerprint(Verdict.NOT_TAKEN, f"there is none of {must_hold} to compare with")
    if not earlier:
        return Fingerprint(Verdict.NOT_TAKEN, "there is nothing earlier to compare with")
    return Fingerprint(Verdict.HOLDS)


def flat(scores: Scores, like: Scores) -> list[float]:
    """All scores in a row; `like` must have the same lengths."""
    return [a for row, other in zip(scores, like, strict=True) for a, _ in zip(row, other, strict=True)]


def finite(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None


def _strays(tokens: int) -> int:
    return math.ceil(STRAYS * tokens)


def _k3(difference: float) -> float:
    try:
        return math.expm1(difference) - difference
    except OverflowError:  # another policy altogether: the figure must not hide that
        return math.inf
