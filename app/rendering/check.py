"""Does a renderer only ever append? Run once when a model is registered; the result stands in its `hone.json`.

Does not cover: what a model really samples (a turn whose text the format would write differently is still kept
verbatim by the bridge), and ids in a rollout, which are checked call by call (`workers.rollouts.calls`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from app.rendering import conversations
from app.rendering.protocol import ChatRenderer, Message, RenderingError, Tool

TOOLS: tuple[Tool, ...] = (conversations.LOOKUP,)


class History(StrEnum):
    """What becomes of the ids of a conversation when it goes on. From best to worst."""

    EXACT = "exact"  # they are extended, and the whole conversation renders to the same ids
    BRIDGED = "bridged"  # they are extended; a render of the whole conversation differs
    NEW_ROOT = "new_root"  # they cannot be extended: the next turn starts from a fresh render
    REFUSED = "refused"  # the format cannot write such messages at all


@dataclass(frozen=True)
class AppendOnly:
    """`cases`: by kind of conversation. `inert`: message text cannot close a turn. `differs`: where, a line each."""

    cases: Mapping[str, History]
    inert: bool
    differs: tuple[str, ...]

    @property
    def bridges(self) -> bool:
        """Every tool turn extends the ids: rollouts have one root."""
        return not self._rollouts(History.NEW_ROOT)

    @property
    def holds(self) -> bool:
        """Every tool turn extends the ids to what the whole conversation renders to."""
        return self.bridges and not self._rollouts(History.BRIDGED)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What it means for an operator, worst first; empty when all is well."""
        found = []
        if roots := self._rollouts(History.NEW_ROOT):
            found.append(
                f"this format cannot extend a history with {_and(roots)}: each such turn starts a new root. Rollouts "
                "are still trained on exactly what was sampled, but every turn is prefilled from its start"
            )
        if changed := self._rollouts(History.BRIDGED):
            found.append(
                f"with {_and(changed)} a whole render differs from what was sampled: rollouts keep the sampled ids, a "
                "chat client that sends its history again is served another prompt than the model was trained on"
            )
        if refused := self._rollouts(History.REFUSED):
            found.append(f"this format cannot write {_and(refused)}")
        if not self.inert:
            found.append("text in rows and tool replies can spell this format's control tokens: it could end a turn")
        return tuple(found)

    def _rollouts(self, state: History) -> list[str]:
        return [name for name in conversations.ROLLOUTS if self.cases.get(name) is state]

    def as_dict(self) -> dict[str, Any]:
        return {
            "append_only": self.holds,
            "bridges": self.bridges,
            "control_tokens_inert": self.inert,
            "cases": {name: state.value for name, state in self.cases.items()},
            "differs": list(self.differs),
            "warnings": list(self.warnings),
        }


def check_append_only(renderer: ChatRenderer) -> AppendOnly:
    """Render conversations of several kinds as a whole and by bridges. Raises RenderingError if none renders."""
    renderer.prompt([{"role": "user", "content": "Hello."}], TOOLS)
    cases: dict[str, History] = {}
    differs: list[str] = []
    for name, conversation in conversations.ALL.items():
        tried = [_history(renderer, variant) for variant in _as_said(conversation)]
        state, differences = min(tried, key=lambda found: list(History).index(found[0]))
        cases[name] = state
        differs += [f"{name}, {difference}" for difference in differences]
    return AppendOnly(cases=cases, inert=_is_inert(renderer), differs=tuple(differs))


def _as_said(conversation: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """As it stands, and with and without thoughts: a format may open a thought that every turn must close, or none."""
    yield conversation
    for thought in ("Hm.", None):
        yield [
            {**message, "reasoning_content": thought} if message["role"] == "assistant" else message
            for message in conversation
        ]


def _history(renderer: ChatRenderer, conversation: Sequence[Message]) -> tuple[History, list[str]]:
    spoken = [index for index, message in enumerate(conversation) if message["role"] == "assistant"]
    ends = [*spoken[1:], len(conversation)]
    worst, differences = History.EXACT, []
    try:
        previous = renderer.prompt(conversation[: spoken[0]], TOOLS)
        for turn, (at, end) in enumerate(zip(spoken, ends, strict=True), start=1):
            whole = renderer.prompt(conversation[:end], TOOLS)
            state, why = _compare(renderer, previous, whole, conversation[at + 1 : end])
            if state is not History.EXACT:
                differences.append(f"turn {turn}: {why}")
                worst = History.NEW_ROOT if History.NEW_ROOT in (state, worst) else state
            previous = whole
    except RenderingError as error:
        return History.REFUSED, [*differences, str(error)]
    return worst, differences


def _compare(
    renderer: ChatRenderer, previous: list[int], whole: list[int], replies: Sequence[Message]
) -> tuple[History, str]:
    rest = whole[len(previous) :] if whole[: len(previous)] == previous else None
    end = next((i + 1 for i, token in enumerate(rest or ()) if token in renderer.stop_token_ids), None)
    # Where the render cannot say what was sampled, any token and a stop will do to see whether the bridge holds.
    said = rest[:end] if rest is not None and end is not None else [previous[0], renderer.stop_token_ids[0]]
    bridged = renderer.bridge(previous, said, replies, TOOLS)
    if bridged is None or bridged[: len(previous) + len(said)] != previous + said:
        return History.NEW_ROOT, "the renderer refuses to bridge it"
    if rest is None:
        return History.BRIDGED, f"the render of the history changes: {_first_difference(renderer, previous, whole)}"
    if end is None:
        return History.BRIDGED, "the assistant turn has no stop token in the render"
    if bridged != whole:
        return History.BRIDGED, f"bridge and render differ: {_first_difference(renderer, bridged, whole)}"
    return History.EXACT, ""


def _first_difference(renderer: ChatRenderer, left: list[int], right: list[int]) -> str:
    pairs = enumerate(zip(left, right, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
    a, b = (renderer.decode(ids[max(0, at - 4) : at + 8]) for ids in (left, right))
    return f"{a!r} against {b!r} at token {at}"


def _is_inert(renderer: ChatRenderer) -> bool:
    """Whether stop tokens spelled out in a user message stay text."""
    spelled = "".join(renderer.decode([token]) for token in renderer.stop_token_ids)
    try:
        ids = [renderer.prompt([{"role": "user", "content": text}], None) for text in ("plain", f"plain {spelled}")]
    except RenderingError:
        return True  # refused altogether
    plain, attempt = (sum(token in renderer.stop_token_ids for token in prompt) for prompt in ids)
    return plain == attempt


def _and(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" or {names[-1]}" if len(names) > 1 else names[0]
