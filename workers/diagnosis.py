"""Where did the time go: what a step, and a job so far, was bound by, in one sentence that says what to change.

Does not cover: measuring (`workers.run`, `workers.rollouts`), and what is wrong with the learning (`workers.monitor`).
Pure: the same times give the same words.

Sampling runs ahead of training, so the parts of a step are not laid end to end. Its wall time splits into waiting for
rollouts, training, publication, waiting for a validation pass, and the rest. Waiting for rollouts is split again by
what those rollouts spent *their* time on. The larger side decides: rollouts that stand ready while the trainer is busy
mean trainer-bound; a trainer that waits means that sampler, tools or grader are, whichever the rollouts spent most on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

from workers.rollouts.types import PHASES, ToolRecord, Trajectory

SLOTS_SCARCE = 0.3  # of the rollouts' time waiting for a slot, while tools or grader hold the slots
TOOL_SATURATED = 0.25  # of the tool time waiting for the tool's own limit: more slots would only lengthen that queue
TAKE_TURNS = 0.2  # both sides wait at least this share of the wall for one another
NO_WAIT = 0.05  # of the wall: the trainer found its rollouts ready
WORTH_SAYING = 0.3  # of the wall: a second cause that belongs into the sentence


class Bound(StrEnum):
    """What more of would make the job faster."""

    SAMPLER = "sampler"  # tokens per second
    TOOL = "tool"  # the user's tools answer late
    QUEUE = "queue"  # slots: tools are slow but could take more calls at once
    GRADER = "grader"
    TRAINER = "trainer"  # rollouts stood ready
    PUBLICATION = "publication"  # writing, loading and proving adapters
    NONE = "none"  # nothing was measured


@dataclass(frozen=True)
class StepTimes:
    """Seconds. The first five fields lie within `wall_s` without overlap; `spent` is summed over the trajectories."""

    wall_s: float
    waiting_for_rollouts_s: float = 0.0  # the trainer had nothing to do
    training_s: float = 0.0
    publication_s: float = 0.0
    evaluation_s: float = 0.0  # the step stood still for a validation pass; not a pass that ran beside it
    rollouts_idle_s: float = 0.0  # nothing was in flight: held back by max_staleness. Overlaps the others
    spent: Mapping[str, float] = field(default_factory=dict)  # of `PHASES`

    def __add__(self, other: StepTimes) -> StepTimes:
        seconds = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "spent"}
        names = {*self.spent, *other.spent}
        spent = {name: self.spent.get(name, 0.0) + other.spent.get(name, 0.0) for name in names}
        return StepTimes(**seconds, spent=spent)


@dataclass(frozen=True)
class ToolFacts:
    """One tool over a step or a job. `p95_s`: of one call; over several steps the mean of theirs, weighted by calls."""

    name: str
    calls: int
    seconds: float
    p95_s: float


@dataclass(frozen=True)
class Diagnosis:
    """`shares` of the wall time sum to 1; `rollouts_idle` is a share of it too, beside them."""

    bound: str
    sentence: str
    shares: dict[str, float]
    rollouts_idle: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shares": {name: round(share, 4) for name, share in self.shares.items()}}


def spent(trajectories: Iterable[Trajectory]) -> dict[str, float]:
    """What a step's trajectories spent their time on, summed."""
    sums = dict.fromkeys(PHASES, 0.0)
    for trajectory in trajectories:
        for name in PHASES:
            sums[name] += trajectory.seconds.get(name, 0.0)
    return sums


def tool_facts(records: Iterable[ToolRecord]) -> list[ToolFacts]:
    """Per tool, the one with the most seconds first. Calls that were never sent do not count."""
    by_name: dict[str, list[float]] = {}
    for record in records:
        if record.attempts:
            by_name.setdefault(record.name, []).append(record.seconds)
    facts = [
        ToolFacts(name, len(seconds), math.fsum(seconds), sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1])
        for name, seconds in by_name.items()
    ]
    return sorted(facts, key=lambda tool: (-tool.seconds, tool.name))


def shares_of(times: StepTimes) -> dict[str, float]:
    """Shares of the wall time by cause; they sum to 1. `idle` is what no phase accounts for."""
    rollouts = math.fsum(times.spent.get(name, 0.0) for name in PHASES)
    parts = {
        name: times.waiting_for_rollouts_s * times.spent.get(name, 0.0) / rollouts if rollouts else 0.0
        for name in PHASES
    }
    parts |= {
        "training": times.training_s,
        "publication": times.publication_s,
        "evaluation": times.evaluation_s,
    }
    covered = math.fsum(parts.values())
    wall = max(times.wall_s, covered)  # clocks of several phases may exceed the wall by a rounding
    if wall <= 0:
        return dict.fromkeys([*parts, "idle"], 0.0)
    return {name: value / wall for name, value in parts.items()} | {"idle": (wall - covered) / wall}


def diagnose(times: StepTimes, tools: Sequence[ToolFacts] = (), *, of: str = "step") -> Diagnosis:
    """What `times` were bound by. `of`: what they are the times of, for the sentence."""
    shares = shares_of(times)
    idle = min(1.0, times.rollouts_idle_s / times.wall_s) if times.wall_s > 0 else 0.0
    sides = {
        "rollouts": math.fsum(shares[name] for name in PHASES),
        Bound.TRAINER: shares["training"],
        Bound.PUBLICATION: shares["publication"],
    }
    largest = max(sides, key=lambda name: sides[name])
    if not sides[largest]:
        return Diagnosis(Bound.NONE, f"nothing to diagnose: no phase of the {of} was measured", shares, idle)
    bound = _rollouts_bound(shares) if largest == "rollouts" else Bound(largest)
    sentence = f"{bound}-bound: {_SENTENCES[bound](shares, tools, of, idle)}{_asides(shares, sides, idle)}"
    return Diagnosis(bound.value, sentence, shares, idle)


def _rollouts_bound(shares: Mapping[str, float]) -> Bound:
    """Which of the things that a rollout waits for. A queue for slots is a symptom of what holds the slots."""
    tool = shares["tools"] + shares["tool_queue"]
    held = {
        Bound.SAMPLER: shares["sampling"] + shares["rendering"],
        Bound.TOOL: tool,
        Bound.GRADER: shares["grading"],
    }
    first = max(held, key=lambda name: held[name])
    if not held[first]:
        return Bound.QUEUE
    everything = math.fsum(held.values()) + shares["queue"]
    scarce = shares["queue"] >= SLOTS_SCARCE * everything
    saturated = first is Bound.TOOL and shares["tool_queue"] >= TOOL_SATURATED * tool
    return Bound.QUEUE if scarce and first is not Bound.SAMPLER and not saturated else first


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _sampler(shares: Mapping[str, float], tools: Sequence[ToolFacts], of: str, idle: float) -> str:
    share = shares["sampling"] + shares["rendering"] + shares["queue"]
    if shares["rendering"] > shares["sampling"]:
        return f"{_percent(share)} of the {of} waited for rollouts, most of it for rendering; give the host more cores"
    return f"{_percent(share)} of the {of} waited for the model to write; add a sampler or lower max_tokens_per_turn"


def _tool(shares: Mapping[str, float], tools: Sequence[ToolFacts], of: str, idle: float) -> str:
    share = shares["tools"] + shares["tool_queue"]
    saturated = shares["tool_queue"] >= TOOL_SATURATED * share
    cause, which = "", "the tool"
    if tools:
        worst = max(tools, key=lambda tool: tool.seconds)
        which = f"`{worst.name}`"
        cause = f", most of it for {which} (p95 {worst.p95_s:.1f} s, {worst.calls} calls)"
    if saturated:
        queue = _percent(shares["tool_queue"] / share)
        return f"{_percent(share)} of the {of} waited for tools{cause}, {queue} of that in line; let it take more calls"
    return f"{_percent(share)} of the {of} waited for tools{cause}; make {which} answer faster"


def _queue(shares: Mapping[str, float], tools: Sequence[ToolFacts], of: str, idle: float) -> str:
    return (
        f"{_percent(shares['queue'])} of the {of} rollouts waited for a slot while those in flight waited for tools or"
        " the grader; raise HONE_MAX_CONCURRENT_ROLLOUTS if the endpoints can take more"
    )


def _grader(shares: Mapping[str, float], tools: Sequence[ToolFacts], of: str, idle: float) -> str:
    return f"{_percent(shares['grading'])} of the {of} waited for the grader; make it answer faster or more at once"


def _trainer(shares: Mapping[str, float], tools: Sequence[ToolFacts], of: str, idle: float) -> str:
    waited = math.fsum(shares[name] for name in PHASES)
    ready = "rollouts stood ready; " if waited < NO_WAIT else ""
    held = f", and for {_percent(idle)} of it nothing was in flight" if idle >= TAKE_TURNS else ""
    return (
        f"{ready}the update took {_percent(shares['training'])} of the {of}{held};"
        " train on more or faster devices, or lower max_trained_rollouts"
    )


def _publication(shares: Mapping[str, float], tools: Sequence[ToolFacts], of: str, idle: float) -> str:
    share = _percent(shares["publication"])
    return f"{share} of the {of} wrote, loaded and proved adapters; use a faster disk or a larger batch_size"


_SENTENCES = {
    Bound.SAMPLER: _sampler,
    Bound.TOOL: _tool,
    Bound.QUEUE: _queue,
    Bound.GRADER: _grader,
    Bound.TRAINER: _trainer,
    Bound.PUBLICATION: _publication,
}


def _asides(shares: Mapping[str, float], sides: Mapping[str, float], idle: float) -> str:
    said = []
    busy = shares["training"] + shares["publication"]
    if min(sides["rollouts"], busy, idle) >= TAKE_TURNS:
        said.append("sampling and training took turns: a higher max_staleness lets them overlap")
    if shares["evaluation"] >= WORTH_SAYING:
        said.append(f"{_percent(shares['evaluation'])} waited for validation: raise eval_interval")
    if shares["idle"] >= WORTH_SAYING:
        said.append(f"{_percent(shares['idle'])} is unaccounted for")
    return "".join(f"; {text}" for text in said)


class JobTimes:
    """The times of all steps of a job. What a metrics event holds under `diagnosis` is enough to begin again."""

    def __init__(self) -> None:
        self._times = StepTimes(0.0)
        self._tools: dict[str, ToolFacts] = {}

    @classmethod
    def from_history(cls, history: Iterable[Mapping[str, Any]]) -> JobTimes:
        """`history`: data of the metrics events so far, oldest first; a validation's event repeats its step's times."""
        job, seen = cls(), set()
        for data in history:
            found = data.get("diagnosis") or {}
            if "seconds" in found and data["step"] not in seen:
                seen.add(data["step"])
                job.add(StepTimes(**found["seconds"]), [ToolFacts(**tool) for tool in found.get("tools", ())])
        return job

    def add(self, times: StepTimes, tools: Sequence[ToolFacts] = ()) -> dict[str, Any]:
        """Count a step; returns its `diagnosis` for the metrics event, with what `from_history` needs."""
        self._times += times
        for tool in tools:
            self._tools[tool.name] = _joined(self._tools.get(tool.name), tool)
        return diagnose(times, tools).as_dict() | {
            "seconds": asdict(times),
            "tools": [asdict(tool) for tool in tools],
        }

    def diagnosis(self) -> Diagnosis:
        """Of the job so far."""
        return diagnose(self._times, list(self._tools.values()), of="job")


def _joined(before: ToolFacts | None, tool: ToolFacts) -> ToolFacts:
    if before is None:
        return tool
    calls = before.calls + tool.calls
    p95 = (before.p95_s * before.calls + tool.p95_s * tool.calls) / max(1, calls)
    return replace(before, calls=calls, seconds=before.seconds + tool.seconds, p95_s=p95)
