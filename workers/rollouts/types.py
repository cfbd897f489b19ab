"""The data of a rollout: what it is given, what it becomes, how it can end. Everything else is functions over these.

Does not cover: rows of the ledger (`app.db.tables.Rollout`) and the trainer's view (`workers.batch.TrainingRow`).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from app.core.states import RolloutState
from app.graders.base import Grade
from workers.rollouts.calls import Call, CallTree, Segment


class StopReason(StrEnum):
    """Why an episode ended. All but `FINAL` and `INVALID_CALL` set `truncated`."""

    FINAL = "final"  # an assistant message without a tool call: the answer
    INVALID_CALL = "invalid_call"  # the message held calls, none of them readable; it counts as the answer
    LENGTH = "length"  # a message was cut at its token limit
    MAX_STEPS = "max_steps"  # the last allowed message still asked for a tool
    TOKEN_BUDGET = "token_budget"
    CONTEXT = "context"  # the next prompt would not fit the model's context
    NO_BRIDGE = "no_bridge"  # the format can neither extend the token history nor write it afresh


@dataclass(frozen=True)
class Row:
    """One dataset row, parsed once. `index` is its 0-based line."""

    index: int
    item: Mapping[str, Any]

    @property
    def messages(self) -> Sequence[Mapping[str, Any]]:
        messages: Sequence[Mapping[str, Any]] = self.item["messages"]
        return messages

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        return self.item.get("tools") or ()

    @property
    def parallel(self) -> bool:
        return self.item.get("parallel_tool_calls", True) is not False


@dataclass(frozen=True)
class Limits:
    """Bounds of one episode, in tokens, messages and seconds."""

    max_steps: int
    max_tokens_per_turn: int
    max_tokens_per_episode: int
    context: int
    tool_timeout_s: float
    grader_timeout_s: float
    rollout_timeout_s: float


@dataclass(frozen=True)
class RolloutKey:
    """Which rollout this is. `group` is shared by siblings and unique within the attempt."""

    id: str
    step: int
    split: str  # train | valid
    row: int
    group: int
    sample: int
    version: int
    greedy: bool = False

    def ledger_row(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "step": self.step,
            "split": self.split,
            "row": self.row,
            "group": self.group,
            "sample": self.sample,
            "version": self.version,
            "greedy": self.greedy,
        }


@dataclass(frozen=True)
class ToolRecord:
    """One executed call, as the trace shows it."""

    call_id: str
    name: str
    arguments: str
    output: str
    status: int
    attempts: int
    seconds: float
    is_error: bool
    queued_s: float = 0.0  # waited for leave to call, before `seconds`


# Where a rollout's time goes; they do not overlap. `queue`: waiting for a slot in the pool, which the pool adds.
PHASES = ("queue", "rendering", "sampling", "tool_queue", "tools", "grading")


@dataclass
class Trajectory:
    """What the engine saw and returned, growing by whole turns. Messages share their texts with the tool records."""

    tree: CallTree = field(default_factory=CallTree)
    messages: list[dict[str, Any]] = field(default_factory=list)  # after the prompt: assistant and tool messages
    tools: list[ToolRecord] = field(default_factory=list)
    prompt_tokens: int = 0
    malformed_calls: int = 0  # blocks that could not be read
    unknown_calls: int = 0  # readable, but of a tool that the row does not offer; answered with an error
    bridge_breaks: int = 0  # turns whose prompt had to be rendered afresh
    drifted: bool = False  # the check against what the engine saw failed
    stop_reason: StopReason | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    activity: str = "waiting"  # what it is doing now, for people
    activity_since: float = 0.0  # monotonic

    @property
    def segments(self) -> list[Segment]:
        """Each with sampled tokens is a training row."""
        return self.tree.segments

    @property
    def turns(self) -> list[Call]:
        return self.tree.calls

    @property
    def ids(self) -> array[int]:
        """Of the current segment, as `mask` and `log_probs`."""
        return self.tree.current.ids

    @property
    def mask(self) -> bytearray:
        return self.tree.current.mask

    @property
    def log_probs(self) -> array[float]:
        return self.tree.current.log_probs

    @property
    def completion_tokens(self) -> int:
        return self.tree.sampled

    @property
    def new_roots(self) -> int:
        """Segments beyond the first: how often the ids could not be extended."""
        return len(self.tree.segments) - 1

    @property
    def invalid_calls(self) -> int:
        return self.malformed_calls + self.unknown_calls

    @property
    def attempted_calls(self) -> int:
        """Every block that was meant as a call, readable or not."""
        return self.malformed_calls + len(self.tools)

    @property
    def truncated(self) -> bool:
        return self.stop_reason not in (None, StopReason.FINAL, StopReason.INVALID_CALL)


@dataclass(frozen=True)
class Ended:
    """A rollout that ended: graded (`state` None: its group decides), or failed with a state and a reason."""

    key: RolloutKey
    trajectory: Trajectory
    grade: Grade | None
    state: RolloutState | None
    error: str | None = None

    @property
    def reward(self) -> float:
        assert self.grade is not None
        return self.grade.score


@dataclass(frozen=True)
class Group:
    """All siblings of one row at one version, every one of them ended."""

    row: Row
    number: int
    version: int
    members: Sequence[Ended]

    @property
    def graded(self) -> list[Ended]:
        return [member for member in self.members if member.grade is not None]
