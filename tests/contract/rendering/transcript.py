"""A thirty-turn rollout of every family through the real loop, compared id by id with what the engine saw.

Does not cover: judging the figures (`test_bridges`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from app.models.catalogue import BaseModel
from app.rendering import conversations
from app.rendering.protocol import ChatRenderer, Message, RenderingError
from app.rendering.registry import build_renderer
from tests.contract.rendering.engine import Engine
from tests.contract.rendering.families import control_tokens, make_family
from tests.unit.rollouts.scripted import LIMITS, Tools, key, setting
from workers.rollouts.trajectory import run_rollout
from workers.rollouts.types import Ended, Row, Trajectory

TURNS = 30
ENDLESS = replace(
    LIMITS,
    max_steps=TURNS,
    max_tokens_per_turn=10_000,
    max_tokens_per_episode=1_000_000,
    context=1_000_000,
    rollout_timeout_s=60.0,
)


@dataclass(frozen=True)
class Figures:
    """Of the turns: `drifted` were not trained as the engine saw and said them, `breaks` had no bridge, `new_roots` did
    not even extend the ids when rendered afresh; `equal` are the prompts that a render of the messages gives."""

    family: str
    spelling: str
    turns: int
    drifted: int
    breaks: int
    new_roots: int
    equal: int

    def line(self) -> str:
        return (
            f"{self.family:<18}{self.spelling:<10}{self.turns:>6}{self.drifted:>9}{self.breaks:>11}{self.new_roots:>11}"
            f"{self.equal:>12} of {self.turns}"
        )


HEADER = (
    f"{'family':<18}{'sampled':<10}{'turns':>6}{'drifted':>9}{'no bridge':>11}{'new roots':>11}{'re-render equal':>18}"
)


async def play(model: BaseModel, *, spelled: bool) -> tuple[Figures, Ended, Engine]:
    """One rollout of `TURNS` turns. spelled: the model writes in single characters, not as the tokenizer would."""
    renderer = build_renderer(model)
    tokenizer = Tokenizer.from_file(str(model.path / "tokenizer.json"))
    engine = Engine(renderer, tokenizer, list(_script()), spelled)
    replies = iter(_replies(control_tokens(model.renderer)))

    async def lookup(body: dict[str, object]) -> tuple[int, object]:
        return 200, {"output": next(replies)}

    row = Row(0, {"messages": [conversations.SYSTEM, conversations.ASK], "tools": [conversations.LOOKUP]})
    row = replace(row, item={**row.item, "parallel_tool_calls": not spelled})
    with ThreadPoolExecutor(1) as executor:
        tools = Tools(lookup=lookup)
        where = setting(engine, tools=tools, renderer=renderer, limits=ENDLESS, executor=executor)
        async with _closing(tools):
            ended = await run_rollout(where, key(), row, Trajectory())
    figures = Figures(
        family=model.renderer,
        spelling="spelled" if spelled else "canonical",
        turns=len(engine.log),
        drifted=drifted(engine, ended.trajectory),
        breaks=ended.trajectory.bridge_breaks,
        new_roots=ended.trajectory.new_roots,
        equal=_equal(renderer, row, engine, ended.trajectory),
    )
    return figures, ended, engine


class _closing:
    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None:
        await self._tools.http.aclose()


def drifted(engine: Engine, trajectory: Trajectory) -> int:
    """By the engine's own log: its prompts and samples against the rows; what extends nothing must be a root."""
    found = 0
    for turn, said in enumerate(engine.log):
        call = trajectory.turns[turn]
        segment = trajectory.segments[call.segment]
        extends = turn > 0 and engine.extends(turn)
        given_from = trajectory.turns[turn - 1].end if extends else 0
        same = (
            list(segment.ids[: call.start]) == said.prompt
            and list(segment.ids[call.start : call.end]) == said.sampled
            and not any(segment.mask[given_from : call.start])
            and all(segment.mask[call.start : call.end])
        )
        continues = turn > 0 and call.segment == trajectory.turns[turn - 1].segment
        found += not (same and continues is extends)
    trained = sum(segment.sampled for segment in trajectory.segments)
    return found + (trained != sum(len(said.sampled) for said in engine.log))


def _equal(renderer: ChatRenderer, row: Row, engine: Engine, trajectory: Trajectory) -> int:
    """How many of the engine's prompts are what a render of the messages so far gives."""
    spoken = [index for index, message in enumerate(trajectory.messages) if message["role"] == "assistant"]
    equal = 0
    for at, said in zip(spoken, engine.log, strict=True):
        try:
            equal += renderer.prompt([*row.messages, *trajectory.messages[:at]], list(row.tools)) == said.prompt
        except RenderingError:
            continue
    return equal


def _script() -> Iterator[Message]:
    """What the model says, turn by turn; the last message is the answer."""
    for turn in range(TURNS - 1):
        yield (
            conversations.call(f"hat {turn}"),
            conversations.call(f"hat {turn}", content="Let me see."),
            conversations.call(f"größe {turn} 🧢 帽子 'x' \"y\""),
            conversations.call(f"hat {turn}", reasoning_content="First the hat.\n\nThen the scarf."),
            conversations.call(f"hat {turn}", f"scarf {turn}"),
            conversations.call("long " * 40 + "hat"),
        )[turn % 6]
    yield conversations.say("The answer is 84.")


def _replies(control: list[str]) -> Iterator[str]:
    """What the tool answers, for ever: plain, empty, blank, foreign, long, and this family's control tokens as text."""
    while True:
        yield from ("84", "", " \n", "größe 🧢 帽子", "word " * 60, "".join(control), "<tool_call>{}</tool_call>")


async def table(directory: Path, families: list[str]) -> AsyncIterator[str]:
    """The figures of all families, a line each."""
    yield HEADER
    for family in families:
        for spelled in (False, True):
            figures, _, _ = await play(make_family(directory / f"{family}-{spelled}", family), spelled=spelled)
            yield figures.line()
