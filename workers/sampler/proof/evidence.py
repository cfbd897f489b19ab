"""All gates for one version on one sampler, with what earlier versions showed there.

Does not cover: loading and retries (`workers.publication`), nor what the trainer's scores are (it sends them).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from app.samplers.errors import SamplerMisbehaved, SamplerRejected
from workers.sampler.proof import Unproved
from workers.sampler.proof.canary import Canary
from workers.sampler.proof.gates import (
    EXACT,
    WIDEST,
    Fingerprint,
    Match,
    Projection,
    Scores,
    Taken,
    Verdict,
    bands_for,
    compare,
    fingerprint,
    noise_of,
    project,
)
from workers.sampler.station import Station


@dataclass(frozen=True)
class Proof:
    """What the gates say of one version on one sampler. `base`: how near v0 is to the base on that same sampler."""

    version: int
    sampler: str
    gate_a: Match
    base: Match | None
    gate_b: Projection | None  # None: no older version to tell it from
    older: Projection | None  # against a version farther away, where the step itself cannot be resolved
    gate_c: Fingerprint
    seconds: Mapping[str, float] = field(default_factory=dict)

    def steady(self) -> Proof:
        """When the engine gave these very scores twice: where gate C holds, it does not serve the older version.

        Then gate B's word that it does is noise, as half precision makes it: what bf16 rounds away is the same in every
        look, and may lie along the step. Taken back only where the served weights also lie on the right side of a
        larger step, from a version farther away (docs/decisions/008).
        """
        step, older = self.gate_b, self.older
        told = self.gate_c.verdict is Verdict.HOLDS and older is not None and older.verdict is Verdict.HOLDS
        if step is None or not step.behind or not told or self.gate_a.bands is EXACT:
            return self
        return replace(self, gate_b=replace(step, refuted=True))

    @property
    def failures(self) -> list[str]:
        """In words, worst first; empty when the version may be used."""
        found = []
        if not self.gate_a.holds:
            found.append(f"gate A: the sampler's version {self.version} is not the trainer's: {self.gate_a.sentence}")
        if self.base is not None and not self.base.holds:
            found.append(f"gate A: version 0 (B = 0) does not equal the base model: {self.base.sentence}")
        for projection in (self.gate_b, self.older):
            if projection is not None and projection.verdict is Verdict.FAILS:
                found.append(f"gate B: another version is served: {projection.sentence}")
        if self.gate_c.verdict is Verdict.FAILS:
            found.append(f"gate C: {self.gate_c.reason}")
        return found

    @property
    def unresolved(self) -> str | None:
        """What this proof does not prove, for an event; never to be read as a pass."""
        if self.gate_b is None or self.gate_b.verdict is not Verdict.NOT_RESOLVABLE:
            return None
        told = f"Version {self.version} could not be told from version {self.gate_b.against}: {self.gate_b.sentence}"
        if self.older is not None and self.older.verdict is Verdict.HOLDS:
            told += f"; it was told from version {self.older.against} ({self.older.sentence})"
        moved = {
            Verdict.HOLDS: "the fingerprint shows that the served weights changed",
            Verdict.NOT_TAKEN: f"no fingerprint: {self.gate_c.reason}",
        }
        return f"{told}; {moved.get(self.gate_c.verdict, self.gate_c.reason)}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "sampler": self.sampler,
            "a": self.gate_a.as_dict(),
            "base": self.base.as_dict() if self.base else None,
            "b": self.gate_b.as_dict() if self.gate_b else {"verdict": str(Verdict.NOT_TAKEN)},
            "older": self.older.as_dict() if self.older else None,
            "c": self.gate_c.as_dict(),
        }


@dataclass
class Seen:
    """What one sampler showed since its start: the base model, and fingerprints by served name."""

    base: Scores | None = None
    prints: dict[str, Taken] = field(default_factory=dict)


@dataclass
class Trained:
    """The trainer's own scores of the canary by version, and the names they are served by (v0's may be the base's)."""

    scores: dict[int, Scores] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)

    def before(self, version: int) -> int | None:
        """The version to tell `version` from."""
        return max((v for v in self.scores if v < version), default=None)

    def forget(self, version: int) -> None:
        """It is not used; the next one is told from the one before it."""
        self.scores.pop(version, None)
        self.names.pop(version, None)

    def keep(self, versions: Iterable[int]) -> None:
        """Forget all others, but for version 0 (calibration, and the farthest step) and the last two."""
        wanted = {0, *versions, *sorted(self.scores)[-2:]}
        self.scores = {v: s for v, s in self.scores.items() if v in wanted}
        self.names = {v: n for v, n in self.names.items() if v in wanted}


async def look(
    station: Station, version: int, canary: Canary, trained: Trained, seen: Seen, dtypes: tuple[str, str], base: str
) -> Proof:
    """Score `version` at `station` and weigh it. Raises `Unproved` when it does not answer with numbers.

    `dtypes`: of sampler and trainer; `base`: the base model's name there. Notes the fingerprint in `seen`.
    """
    name, previous = trained.names[version], trained.before(version)
    began = time.monotonic()
    async with canary.alone(station) as quiet:
        waited = time.monotonic() - began
        earlier: dict[str, Scores] = {}
        try:
            if seen.base is None or (quiet.held and base not in seen.prints):
                seen.base = earlier[base] = await canary.score(station, base, quiet)
            # The version before may have been published while the engine was busy; it is still loaded.
            if quiet.held and previous in station.proved and trained.names[previous] not in seen.prints:
                earlier[trained.names[previous]] = await canary.score(station, trained.names[previous], quiet)
            served = await canary.score(station, name, quiet)
        except (SamplerMisbehaved, SamplerRejected) as error:  # NaN weights are a 400 at vLLM
            raise Unproved(f"version {version} gives no scores: {error.reason}", sampler=station.sampler.url) from error
    mine, versions = trained.scores[version], {n: v for v, n in trained.names.items()} | {base: 0}
    if quiet.held:
        for other, scores in earlier.items():
            seen.prints[other] = Taken(scores, trained.scores.get(versions[other]))
    baseline = compare(seen.base, trained.scores[0], WIDEST) if 0 in trained.scores else None
    bands = bands_for(*dtypes, baseline)
    against_base = compare(served, seen.base, bands) if version == 0 else None
    if baseline is not None and bands is not EXACT and not baseline.holds:
        raise Unproved(
            f"the base model itself differs too much from the trainer's for any proof: {baseline.sentence}",
            sampler=station.sampler.url,
            figures=baseline.as_dict(),
        )
    noise = noise_of(baseline, *dtypes) if baseline else None

    def against(other: int) -> Projection:
        exact = dtypes[1] == "float32"
        return project(served, mine, trained.scores[other], against=other, noise=noise, exact=exact)

    step = None if previous is None else against(previous)
    return Proof(
        version=version,
        sampler=station.sampler.id,
        gate_a=compare(served, mine, bands),
        base=against_base,
        gate_b=step,
        older=_older(version, trained, against) if step and step.verdict is not Verdict.HOLDS else None,
        gate_c=_print(seen, Taken(served, mine), trained, version, base, quiet.why_not),
        seconds={"quiet": waited, "canary": time.monotonic() - began - waited},
    )


def _older(version: int, trained: Trained, against: Callable[[int], Projection]) -> Projection | None:
    """The step from the nearest older version that can be resolved, else from the farthest; None without one."""
    found = None
    for older in sorted((v for v in trained.scores if v < version), reverse=True)[1:]:
        found = against(older)
        if found.verdict is not Verdict.NOT_RESOLVABLE:
            break
    return found


def _print(seen: Seen, mine: Taken, trained: Trained, version: int, base: str, why_not: str | None) -> Fingerprint:
    """Gate C; a version 0 must equal the base, which gate A looks after."""
    if why_not is not None:
        return Fingerprint(Verdict.NOT_TAKEN, why_not)
    name, previous = trained.names[version], trained.before(version)
    earlier = {
        other: taken for other, taken in seen.prints.items() if other != name and not (version == 0 and other == base)
    }
    found = fingerprint(mine, earlier, must_hold=None if previous is None else trained.names[previous])
    seen.prints[name] = mine
    known = {base, *trained.names.values()}
    seen.prints = {other: taken for other, taken in seen.prints.items() if other in known}
    return found
