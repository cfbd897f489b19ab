"""The tokens of a rollout: a tree of model calls, kept as flat segments that each become one training row.

Does not cover: who samples (`trajectory`) and which rows a step takes (`batch`).

A node is a call: the ids that the engine was sent, and what it sampled. Its parent is the call whose ids (prompt and
sample) are the longest prefix of its prompt. As long as turns extend the ids, all calls lie on one path, which is one
segment. Where the history had to be rendered afresh a new segment begins; its prompt is given (mask 0) even where it
repeats an earlier path, so every sampled token is trained exactly once, in the segment where it was sampled.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

DIGEST_BYTES = 8
PIECE = 2000  # bytes: above 2,047 hashlib lets go of the interpreter lock, and getting it back costs more than the hash


class TokenDrift(Exception):
    """The recorded ids are not what the engine was sent and returned: the rollout must not be trained on."""


@dataclass(slots=True)
class Segment:
    """One path of the tree as parallel arrays, 9 bytes a token; mask 1 = sampled here."""

    parent: int | None = None  # the call whose ids it begins with; None: a root
    ids: array[int] = field(default_factory=lambda: array("i"))
    mask: bytearray = field(default_factory=bytearray)
    log_probs: array[float] = field(default_factory=lambda: array("f"))

    def give(self, ids: Sequence[int]) -> None:
        """Append ids that were not sampled."""
        self.ids.extend(ids)
        self.mask.extend(bytes(len(ids)))
        self.log_probs.frombytes(bytes(len(ids) * self.log_probs.itemsize))

    def take(self, ids: Sequence[int], log_probs: Sequence[float]) -> None:
        """Append ids that were sampled, with their log-probs."""
        self.ids.extend(ids)
        self.mask.extend(b"\1" * len(ids))
        self.log_probs.extend(log_probs)

    @property
    def sampled(self) -> int:
        return self.mask.count(1)


@dataclass(frozen=True, slots=True)
class Call:
    """A node: tokens [start, end) of its segment were sampled by `version`, served as `model`, after ids [0, start)."""

    segment: int
    parent: int | None
    start: int
    end: int
    model: str
    version: int
    sampler: str | None
    finish_reason: str
    seconds: float
    sent: bytes  # digest of the prompt as it was sent
    received: bytes  # digest of ids and log-probs as they were returned

    def as_dict(self) -> dict[str, Any]:
        """As the trace shows it."""
        return {
            "model": self.model,
            "version": self.version,
            "sampler": self.sampler,
            "segment": self.segment,
            "parent": self.parent,
            "start": self.start,
            "end": self.end,
            "prompt_tokens": self.start,
            "completion_tokens": self.end - self.start,
            "finish_reason": self.finish_reason,
            "seconds": round(self.seconds, 4),
        }


@dataclass(slots=True)
class CallTree:
    """Grows by whole calls; the last segment is the one that is being extended."""

    segments: list[Segment] = field(default_factory=lambda: [Segment()])
    calls: list[Call] = field(default_factory=list)

    @property
    def current(self) -> Segment:
        return self.segments[-1]

    @property
    def sampled(self) -> int:
        """Tokens sampled in the whole rollout."""
        return sum(segment.sampled for segment in self.segments)

    def restart(self, prompt: array[int]) -> None:
        """Go on from a prompt that was rendered afresh: in place if it extends the history after all."""
        length = len(self.current.ids)
        if prompt[:length] == self.current.ids:
            self.current.give(prompt[length:])
            return
        segment = Segment(parent=self._parent(prompt))
        segment.give(prompt)
        self.segments.append(segment)

    def record(
        self,
        prompt: array[int],
        ids: Sequence[int],
        log_probs: Sequence[float],
        *,
        model: str,
        version: int,
        sampler: str | None,
        finish_reason: str,
        seconds: float,
    ) -> Call:
        """A call was answered: `prompt` is what was sent, `ids` and `log_probs` what came back."""
        here, start = len(self.segments) - 1, len(self.current.ids)
        within = bool(self.calls) and self.calls[-1].segment == here
        taken, rates = array("i", ids), array("f", log_probs)
        call = Call(
            segment=here,
            parent=len(self.calls) - 1 if within else self.current.parent,
            start=start,
            end=start + len(taken),
            model=model,
            version=version,
            sampler=sampler,
            finish_reason=finish_reason,
            seconds=seconds,
            sent=_digest(prompt),
            received=_digest(taken, rates),
        )
        self.current.take(taken, rates)
        self.calls.append(call)
        return call

    def verify(self) -> None:
        """What would be trained is what the engine saw and said, call by call; linear. Raises `TokenDrift`."""
        for number, segment in enumerate(self.segments):
            if not len(segment.ids) == len(segment.mask) == len(segment.log_probs):
                raise TokenDrift(f"segment {number}: ids, mask and log-probs differ in length")
            seen, position = blake2b(digest_size=DIGEST_BYTES), 0
            for index, call in enumerate(self.calls):
                if call.segment != number:
                    continue
                _feed(seen, segment.ids[position : call.start])
                if call.start < position or seen.digest() != call.sent:
                    raise TokenDrift(f"call {index}: the prompt is not what the engine was sent")
                ids, log_probs = segment.ids[call.start : call.end], segment.log_probs[call.start : call.end]
                if _digest(ids, log_probs) != call.received:
                    raise TokenDrift(f"call {index}: ids or log-probs are not what the engine returned")
                given, sampled = segment.mask[position : call.start], segment.mask[call.start : call.end]
                if any(given) or sampled.count(1) != call.end - call.start:
                    raise TokenDrift(f"call {index}: the mask does not mark exactly what was sampled")
                _feed(seen, ids)
                position = call.end
            if any(segment.mask[position:]):
                raise TokenDrift(f"segment {number}: the mask marks tokens that no call sampled")

    def _parent(self, prompt: array[int]) -> int | None:
        """The call whose prompt and sample are the longest prefix of `prompt`."""
        best = None
        for index, call in enumerate(self.calls):
            if best is not None and call.end <= self.calls[best].end:
                continue
            if prompt[: call.end] == self.segments[call.segment].ids[: call.end]:
                best = index
        return best


def _digest(*arrays: array[int] | array[float]) -> bytes:
    found = blake2b(digest_size=DIGEST_BYTES)
    for each in arrays:
        _feed(found, each)
    return found.digest()


def _feed(digest: blake2b, values: array[int] | array[float]) -> None:
    octets = values.tobytes()
    for first in range(0, len(octets), PIECE):
        digest.update(octets[first : first + PIECE])
