"""One trajectory against scripted turns: its token history, how it ends, and what a fault becomes."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.core.states import RolloutState
from app.graders.base import GraderFailed, InvalidScore
from app.rendering.protocol import MessageNotRenderable
from app.rendering.registry import build_renderer
from app.rendering.tokens import TextTokenizer
from app.samplers.errors import SamplerUnavailable
from tests.tiny import make_weightless_llama
from tests.unit.rollouts.scripted import (
    END,
    LIMITS,
    LOOKUP,
    CharRenderer,
    ScriptedGrader,
    ScriptedPolicy,
    Tools,
    completion,
    ids,
    key,
    limited,
    roll,
    row,
    says,
    setting,
    text,
)
from workers.rollouts.trajectory import run_rollout
from workers.rollouts.types import StopReason, Trajectory


async def test_a_two_turn_episode_keeps_every_sampled_id_and_log_prob() -> None:
    policy = ScriptedPolicy([f"let me see|{LOOKUP}", "84"])
    found = await roll(setting(policy, tools=Tools(lookup=says("31"))), row(0, "lookup"))
    trajectory = found.trajectory
    first, second = completion(f"let me see|{LOOKUP}"), completion("84", turn=1)
    prompt, between = "[lookup]<user>row 0<assistant>", "<tool>31<assistant>"
    assert text(trajectory.ids) == f"{prompt}let me see|{LOOKUP}{END}{between}84{END}"
    assert list(trajectory.mask) == [0] * len(prompt) + [1] * len(first.token_ids) + [0] * len(between) + [1] * 3
    log_probs = [0.0] * len(prompt) + [*first.log_probs] + [0.0] * len(between) + [*second.log_probs]
    assert list(trajectory.log_probs) == pytest.approx(log_probs)
    assert policy.requests[1].prompt_ids == trajectory.ids[:-3]
    assert (len(trajectory.segments), trajectory.bridge_breaks) == (1, 0)
    assert (found.reward, trajectory.stop_reason, trajectory.truncated) == (1.0, StopReason.FINAL, False)
    assert (trajectory.prompt_tokens, trajectory.completion_tokens) == (len(prompt), len(first.token_ids) + 3)


async def test_the_history_is_never_rendered_again() -> None:
    class Once(CharRenderer):
        prompts = 0

        def prompt(self, *args: Any) -> list[int]:
            self.prompts += 1
            return super().prompt(*args)

    renderer = Once()
    await roll(
        setting(ScriptedPolicy([LOOKUP, LOOKUP, "1"]), tools=Tools(lookup=says("x")), renderer=renderer),
        row(0, "lookup"),
    )
    assert renderer.prompts == 1


async def test_a_real_format_carries_the_sampled_ids_verbatim(tmp_path: Path) -> None:
    renderer = build_renderer(make_weightless_llama(tmp_path / "tiny"))
    call = '<tool_call>{"name": "lookup", "arguments": {"item": "hat"}}</tool_call>'
    letters = TextTokenizer.load(tmp_path / "tiny", name="tiny")
    # Spelled letter by letter: ids that this text would never be tokenised to.
    said = [*(i for letter in call for i in letters.encode(letter)), *renderer.stop_token_ids[:1]]
    assert said[:-1] != letters.encode(call)
    turn = replace(completion(""), token_ids=tuple(said), log_probs=(-0.5,) * len(said))
    policy = ScriptedPolicy([turn, replace(turn, token_ids=tuple(said[-1:]), log_probs=(-0.25,))])
    trajectory = (
        await roll(setting(policy, tools=Tools(lookup=says("31")), renderer=renderer), row(0, "lookup"))
    ).trajectory
    start = trajectory.prompt_tokens
    assert list(trajectory.ids[start : start + len(said)]) == said
    assert len(trajectory.ids) == len(trajectory.mask) == len(trajectory.log_probs)
    assert "31" in renderer.decode(trajectory.ids[start + len(said) :])


async def test_tool_calls_carry_the_trace_and_the_row() -> None:
    tools = Tools(lookup=says("31"))
    found = await roll(setting(ScriptedPolicy([LOOKUP, "84"]), tools=tools), row(0, "lookup", price=3), id="trace_x")
    assert tools.seen[0]["trace_id"] == "trace_x"
    assert tools.seen[0]["item"]["price"] == 3
    assert tools.seen[0]["arguments"] == '{"item": "hat"}'
    assistant, result, final = found.trajectory.messages
    assert assistant["tool_calls"][0]["id"] == tools.seen[0]["call_id"] == result["tool_call_id"]
    assert (result["role"], result["content"], final["content"]) == ("tool", "31", "84")


async def test_a_message_of_unreadable_calls_only_is_the_answer() -> None:
    grader = ScriptedGrader(0.25)
    found = await roll(setting(ScriptedPolicy(["hm|!lookup {"]), grader), row(0, "lookup"))
    assert (found.trajectory.stop_reason, found.trajectory.invalid_calls) == (StopReason.INVALID_CALL, 1)
    assert (found.reward, found.trajectory.truncated) == (0.25, False)
    assert grader.seen[0][0].output_text == "hm\n!lookup {"  # what could not be read stays visible


async def test_a_cut_message_ends_the_episode_and_its_calls_are_not_run() -> None:
    tools, grader = Tools(lookup=says("31")), ScriptedGrader()
    found = await roll(
        setting(ScriptedPolicy([completion(LOOKUP, "length")]), grader, tools),
        row(0, "lookup"),
    )
    assert (found.trajectory.stop_reason, found.trajectory.truncated) == (StopReason.LENGTH, True)
    assert tools.seen == []
    assert grader.seen[0][0].choices[0]["finish_reason"] == "length"


async def test_at_the_last_message_calls_are_not_run_and_the_episode_is_graded_as_truncated() -> None:
    tools, grader = Tools(lookup=says("31")), ScriptedGrader(0.5)
    found = await roll(setting(ScriptedPolicy([LOOKUP]), grader, tools, limits=limited(max_steps=2)), row(0, "lookup"))
    assert (found.trajectory.stop_reason, found.trajectory.truncated) == (StopReason.MAX_STEPS, True)
    assert (len(tools.seen), len(found.trajectory.turns), found.reward) == (1, 2, 0.5)
    assert grader.seen[0][0].choices[0]["finish_reason"] == "tool_calls"


async def test_the_token_budget_of_an_episode_bounds_a_turn_and_then_ends_it() -> None:
    said = len(LOOKUP) + 1
    policy = ScriptedPolicy([LOOKUP])
    where = setting(policy, tools=Tools(lookup=says("31")), limits=limited(max_tokens_per_episode=2 * said))
    found = await roll(where, row(0, "lookup"))
    assert [request.max_tokens for request in policy.requests] == [2 * said, said]
    assert (found.trajectory.stop_reason, found.trajectory.truncated) == (StopReason.TOKEN_BUDGET, True)


async def test_a_turn_is_asked_for_no_more_than_the_context_holds() -> None:
    policy = ScriptedPolicy([LOOKUP])
    prompt = len("[lookup]<user>row 0<assistant>")
    where = setting(policy, tools=Tools(lookup=says("x" * 50)), limits=limited(context=prompt + 60))
    found = await roll(where, row(0, "lookup"))
    assert [request.max_tokens for request in policy.requests] == [60]
    assert (found.trajectory.stop_reason, found.trajectory.truncated) == (StopReason.CONTEXT, True)


class Forgetful(CharRenderer):
    """Cannot extend a history, and writes an earlier turn otherwise than it was sampled."""

    holds = False


class Rewriting(CharRenderer):
    """Its bridges change the first id."""

    def bridge(self, prompt_ids: Any, *rest: Any) -> list[int] | None:
        return super().bridge([0, *prompt_ids[1:]], *rest)


class Patient(CharRenderer):
    """Cannot extend a history, and yet writes it afresh id by id as it was sampled."""

    holds = False

    def prompt(self, messages: Any, tools: Any) -> list[int]:
        said = [f"{LOOKUP}{END}<tool>{m['content']}<assistant>" for m in messages[1:] if m["role"] == "tool"]
        return super().prompt(messages[:1], tools) + ids("".join(said))


@pytest.mark.parametrize("renderer", [Forgetful(), Rewriting()], ids=["no bridge", "a bridge that changes the past"])
async def test_a_history_that_cannot_be_extended_is_rendered_afresh_as_a_new_root(renderer: CharRenderer) -> None:
    policy = ScriptedPolicy([LOOKUP, "84"])
    trajectory = (
        await roll(setting(policy, tools=Tools(lookup=says("31")), renderer=renderer), row(0, "lookup"))
    ).trajectory
    first, second = trajectory.segments
    prompt, afresh = "[lookup]<user>row 0<assistant>", "[lookup]<user>row 0<assistant>None<tool>31<assistant>"
    assert (text(first.ids), text(second.ids)) == (f"{prompt}{LOOKUP}{END}", f"{afresh}84{END}")
    assert list(first.mask) == [0] * len(prompt) + [1] * (len(LOOKUP) + 1)
    assert list(second.mask) == [0] * len(afresh) + [1] * 3
    assert list(second.log_probs[-3:]) == pytest.approx(completion("84", turn=1).log_probs)
    assert text(policy.requests[1].prompt_ids) == afresh
    assert (trajectory.stop_reason, trajectory.new_roots, trajectory.bridge_breaks) == (StopReason.FINAL, 1, 1)
    assert trajectory.completion_tokens == len(LOOKUP) + 1 + 3


async def test_a_fresh_render_that_extends_the_history_opens_no_root() -> None:
    where = setting(ScriptedPolicy([LOOKUP, LOOKUP, "84"]), tools=Tools(lookup=says("31")), renderer=Patient())
    trajectory = (await roll(where, row(0, "lookup"))).trajectory
    assert (trajectory.new_roots, trajectory.bridge_breaks, len(trajectory.turns)) == (0, 2, 3)
    assert text(trajectory.ids).endswith(f"{LOOKUP}{END}<tool>31<assistant>84{END}")


async def test_the_token_budget_counts_every_root() -> None:
    said = len(LOOKUP) + 1
    limits = limited(max_tokens_per_episode=2 * said)
    where = setting(ScriptedPolicy([LOOKUP]), tools=Tools(lookup=says("31")), renderer=Forgetful(), limits=limits)
    trajectory = (await roll(where, row(0, "lookup"))).trajectory
    assert [segment.sampled for segment in trajectory.segments] == [said, said, 0]
    assert trajectory.stop_reason is StopReason.TOKEN_BUDGET


async def test_a_format_that_can_neither_extend_nor_rewrite_ends_the_episode() -> None:
    class Stuck(Forgetful):
        def prompt(self, messages: Any, tools: Any) -> list[int]:
            if len(messages) > 1:
                raise MessageNotRenderable("messages.1", "no")
            return super().prompt(messages, tools)

    found = await roll(
        setting(ScriptedPolicy([LOOKUP]), tools=Tools(lookup=says("31")), renderer=Stuck()), row(0, "lookup")
    )
    assert (found.trajectory.stop_reason, found.trajectory.truncated) == (StopReason.NO_BRIDGE, True)
    assert found.trajectory.messages[-1]["content"] == "31"


@pytest.mark.parametrize("change", [lambda t: t.ids.__setitem__(3, 7), lambda t: t.ids.__setitem__(-20, 7),
                                    lambda t: t.log_probs.__setitem__(-20, -9.0), lambda t: t.mask.__setitem__(0, 1)],
                         ids=["a prompt id", "a sampled id", "a log-prob", "the mask"])  # fmt: skip
async def test_ids_that_are_not_what_the_engine_saw_are_never_graded(change: Any) -> None:
    trajectory, grader = Trajectory(), ScriptedGrader()

    async def later(request: Any) -> None:
        if request.request_id.endswith("-1"):
            change(trajectory)

    policy = ScriptedPolicy([LOOKUP, "84"], before=later)
    where = setting(policy, grader, Tools(lookup=says("31")))
    found = await run_rollout(where, key(), row(0, "lookup"), trajectory)
    assert (found.state, found.grade, trajectory.drifted) == (RolloutState.SAMPLER_FAILED, None, True)
    assert (found.error or "").startswith("token drift: ")
    assert grader.seen == []


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (GraderFailed("g", "http://g", 4, "answered 500"), RolloutState.GRADER_FAILED),
        (InvalidScore("g", "NaN"), RolloutState.INVALID_SCORE),
    ],
)
async def test_a_grader_that_gives_no_score_is_never_a_reward(error: Exception, state: RolloutState) -> None:
    found = await roll(setting(ScriptedPolicy(["84"]), ScriptedGrader(error)), row())
    assert (found.state, found.grade, found.error) == (state, None, str(error))


@pytest.mark.parametrize(("wants_json", "parsed"), [(True, 84), (False, None)])
async def test_a_grader_gets_the_answer_parsed_where_the_job_has_a_response_format(
    wants_json: bool, parsed: int | None
) -> None:
    grader = ScriptedGrader()
    await roll(setting(ScriptedPolicy(["84"]), grader, wants_json=wants_json), row())
    assert [sample.output_json for sample, _ in grader.seen] == [parsed]


async def test_a_sampler_fault_is_a_state_with_the_errors_name() -> None:
    found = await roll(setting(ScriptedPolicy([SamplerUnavailable("gone", url="http://s")])), row())
    assert found.state is RolloutState.SAMPLER_FAILED
    assert found.error == "SamplerUnavailable: gone (http://s)"


@pytest.mark.parametrize(("greedy", "temperature"), [(True, 0.0), (False, 1.0)])
async def test_greedy_is_temperature_zero(greedy: bool, temperature: float) -> None:
    policy = ScriptedPolicy(["84"])
    await roll(setting(policy), row(), greedy=greedy)
    assert policy.requests[0].temperature == temperature


async def test_a_row_without_parallel_calls_stops_after_the_first() -> None:
    policy = ScriptedPolicy(["84"])
    for what in (row(0, "lookup", parallel_tool_calls=False), row(0, "lookup"), row(0, parallel_tool_calls=False)):
        await roll(setting(policy), what)
    assert [request.stop for request in policy.requests] == [("}",), (), ()]


async def test_a_slow_tool_cannot_outlast_the_rollouts_deadline() -> None:
    async def endless(body: dict[str, Any]) -> tuple[int, Any]:
        await asyncio.sleep(30)
        raise AssertionError

    began = time.monotonic()
    where = setting(ScriptedPolicy([LOOKUP]), tools=Tools(lookup=endless), limits=limited(rollout_timeout_s=0.5))
    found = await roll(where, row(0, "lookup"))
    assert found.state is RolloutState.TOOL_FAILED
    assert time.monotonic() - began < 20


async def test_every_turn_and_the_grader_get_the_same_deadline() -> None:
    policy, deadlines = ScriptedPolicy([LOOKUP, "84"]), []

    class Noting(ScriptedGrader):
        async def grade(self, *args: Any, deadline: float | None = None) -> Any:
            deadlines.append(deadline)
            return await super().grade(*args)

    before = time.monotonic()
    await roll(setting(policy, Noting(), Tools(lookup=says("31"))), row(0, "lookup"))
    assert {request.deadline for request in policy.requests} == set(deadlines)
    assert before <= deadlines[0] - LIMITS.rollout_timeout_s <= time.monotonic()


async def test_time_is_counted_by_phase_and_the_turns_are_recorded() -> None:
    async def slow(body: dict[str, Any]) -> tuple[int, Any]:
        await asyncio.sleep(0.05)
        return 200, {"output": "31"}

    found = await roll(setting(ScriptedPolicy([LOOKUP, "84"]), tools=Tools(lookup=slow)), row(0, "lookup"))
    seconds, turns = found.trajectory.seconds, found.trajectory.turns
    assert seconds["tools"] >= 0.05 > seconds["sampling"]
    assert [turn.end - turn.start for turn in turns] == [len(ids(LOOKUP)) + 1, 3]
    assert [(turn.model, turn.version, turn.parent) for turn in turns] == [("adapter", 3, None), ("adapter", 3, 0)]
    assert seconds.keys() == {"queue", "rendering", "sampling", "tool_queue", "tools", "grading"}
