"""What is trained is what the engine saw, in every renderer family: thirty turns, no drifted one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from app.models.catalogue import Catalogue
from app.rendering.check import check_append_only
from app.rendering.registry import build_renderer, renderer_names
from tests.contract.rendering.families import CONTROL, NOT_COVERED, make_family
from tests.contract.rendering.transcript import TURNS, drifted, play
from workers.rollouts.types import StopReason

# Formats that cannot bridge every turn.
NO_BRIDGE = {
    "deepseek-r1": TURNS - 1,  # its template never shows earlier reasoning: a root for each turn, nothing lost
    "deepseek-v4": 5,  # it sorts the results of parallel calls by the ids of a message that a bridge does not see
}
# Formats whose render differs even from what the model wrote in its own words.
RENDERS_OTHERWISE = {
    "kimi-k2": "it writes the call ids, which are ours in the messages and the model's in its words",
    "laguna-m.1": "its bridge leaves out the line break before a tool's answer",
    "laguna-xs.2": "its bridge leaves out the line break before a tool's answer",
}


@pytest.mark.parametrize("spelled", [False, True], ids=["canonical", "spelled"])
@pytest.mark.parametrize("family", list(CONTROL))
async def test_no_turn_of_thirty_drifts(family: str, spelled: bool, tmp_path: Path) -> None:
    figures, ended, engine = await play(make_family(tmp_path / "model", family), spelled=spelled)
    sys.stdout.write(f"\n{figures.line()}")
    assert (ended.state, ended.error, ended.trajectory.stop_reason) == (None, None, StopReason.FINAL)
    assert (figures.turns, len(engine.log), figures.drifted) == (TURNS, TURNS, 0)
    assert figures.breaks == NO_BRIDGE.get(family, 0)
    assert figures.new_roots <= figures.breaks
    if not spelled:
        assert (figures.equal == TURNS) is (family not in RENDERS_OTHERWISE)
    elif family not in NO_BRIDGE:
        assert figures.equal == 1  # a loop that renders anew each turn would train on other ids than were sampled


@pytest.mark.parametrize("family", list(CONTROL))
def test_the_check_at_registration_foretells_it(family: str, tmp_path: Path) -> None:
    found = check_append_only(build_renderer(make_family(tmp_path / "model", family)))
    assert found.bridges is (family not in NO_BRIDGE)
    by_format = RENDERS_OTHERWISE.keys() - {"kimi-k2"}  # the check uses the same call ids on both sides
    assert found.holds is (family not in NO_BRIDGE and family not in by_format)


def test_every_renderer_is_covered_or_says_why_not() -> None:
    assert {*CONTROL, *NOT_COVERED} == set(renderer_names())
    assert not CONTROL.keys() & NOT_COVERED.keys()


async def test_a_single_changed_id_is_a_drifted_turn(tmp_path: Path) -> None:
    figures, ended, engine = await play(make_family(tmp_path / "model", "qwen3"), spelled=False)
    assert figures.drifted == 0
    ended.trajectory.ids[ended.trajectory.turns[-1].start - 1] += 1
    assert drifted(engine, ended.trajectory) == 1


@pytest.mark.parametrize("spelled", [False, True], ids=["canonical", "spelled"])
async def test_no_turn_drifts_with_a_real_vocabulary(spelled: bool) -> None:
    models = Catalogue(Path.home() / ".cache" / "hone" / "models").list()
    found = [model for model in models if model.renderer in CONTROL]
    if not found:
        pytest.skip("no base model is installed on this machine")
    for model in found:
        figures, _, _ = await play(model, spelled=spelled)
        sys.stdout.write(f"\n{figures.line()} ({model.id})")
        assert (figures.turns, figures.drifted, figures.new_roots) == (TURNS, 0, 0)
