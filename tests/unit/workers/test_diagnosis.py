"""The sentence names what more of would make the job faster, and the figures it rests on."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from workers.diagnosis import JobTimes, StepTimes, ToolFacts, diagnose, shares_of, spent, tool_facts
from workers.rollouts.types import ToolRecord, Trajectory

SEARCH = ToolFacts("search", 412, 3000.0, 8.1)


def waiting(seconds: float, **spent: float) -> StepTimes:
    """A step of 100 s of which the trainer waited `seconds` for rollouts and worked the rest but 2 s."""
    return StepTimes(100.0, seconds, 98.0 - seconds, 1.0, spent=spent)


@pytest.mark.parametrize(
    ("times", "bound", "words"),
    [
        (waiting(80, sampling=90.0, tools=10.0), "sampler", "72 % of the step waited for the model to write"),
        (waiting(80, sampling=20.0, tools=80.0), "tool", "64 % of the step waited for tools, most of it for `search`"),
        (waiting(80, sampling=20.0, tools=40.0, tool_queue=40.0), "tool", "50 % of that in line"),
        (waiting(80, sampling=20.0, tools=10.0, grading=70.0), "grader", "56 % of the step waited for the grader"),
        (waiting(80, sampling=10.0, tools=40.0, queue=50.0), "queue", "40 % of the step rollouts waited for a slot"),
        (waiting(3, sampling=90.0), "trainer", "rollouts stood ready; the update took 95 % of the step"),
        (StepTimes(100.0, 20.0, 30.0, 45.0, spent={"sampling": 1.0}), "publication", "45 % of the step wrote, loaded"),
    ],
)
def test_the_larger_side_is_the_bound_and_the_sentence_says_by_how_much(
    times: StepTimes, bound: str, words: str
) -> None:
    found = diagnose(times, [ToolFacts("calc", 9, 1.0, 0.1), SEARCH])
    assert found.bound == bound
    assert found.sentence.startswith(f"{bound}-bound: ")
    assert words in found.sentence
    assert math.isclose(math.fsum(found.shares.values()), 1.0)


def test_a_queue_for_slots_that_the_model_holds_is_the_samplers() -> None:
    found = diagnose(waiting(80, queue=60.0, sampling=38.0, tools=2.0))
    assert found.bound == "sampler"
    assert "78 % of the step" in found.sentence


def test_a_queue_for_slots_that_a_saturated_tool_holds_is_the_tools() -> None:
    assert diagnose(waiting(80, queue=60.0, tools=20.0, tool_queue=18.0, sampling=2.0)).bound == "tool"


def test_more_update_than_waiting_is_trainer_bound_although_the_trainer_waits_too() -> None:
    assert diagnose(waiting(45, sampling=50.0, tools=50.0)).bound == "trainer"


def test_two_sides_that_wait_for_one_another_are_told_to_overlap() -> None:
    turns = StepTimes(100.0, 50.0, 45.0, 5.0, rollouts_idle_s=50.0, spent={"sampling": 1.0})
    assert "max_staleness" in diagnose(turns).sentence
    overlapped = StepTimes(100.0, 50.0, 45.0, 5.0, rollouts_idle_s=2.0, spent={"sampling": 1.0})
    assert "max_staleness" not in diagnose(overlapped).sentence


def test_waiting_for_validation_and_lost_time_are_said_beside_the_bound() -> None:
    found = diagnose(StepTimes(100.0, 20.0, 10.0, 0.0, 35.0, spent={"sampling": 1.0}))
    assert found.bound == "sampler"
    assert "35 % waited for validation" in found.sentence
    assert "35 % is unaccounted for" in found.sentence
    assert found.shares["idle"] == pytest.approx(0.35)


def test_nothing_measured_is_no_bound() -> None:
    found = diagnose(StepTimes(0.0))
    assert (found.bound, set(found.shares.values())) == ("none", {0.0})


def test_phases_that_exceed_the_wall_by_a_rounding_still_sum_to_one() -> None:
    shares = shares_of(StepTimes(1.0, 0.6, 0.41, spent={"tools": 3.0, "grading": 1.0}))
    assert math.isclose(math.fsum(shares.values()), 1.0)
    assert shares["tools"] == pytest.approx(3 * shares["grading"])


def test_tools_are_ranked_by_the_seconds_they_cost_and_calls_never_sent_do_not_count() -> None:
    def record(name: str, seconds: float, attempts: int = 1) -> ToolRecord:
        return ToolRecord("c", name, "{}", "", 200, attempts, seconds, False)

    records = [record("b", 1.0), record("a", 4.0), record("b", 2.0), record("unknown", 0.0, attempts=0)]
    assert tool_facts(records) == [ToolFacts("a", 1, 4.0, 4.0), ToolFacts("b", 2, 3.0, 2.0)]


def test_what_trajectories_spent_is_summed_by_kind() -> None:
    one, two = Trajectory(), Trajectory()
    one.seconds = {"sampling": 1.0, "tools": 2.0}
    two.seconds = {"sampling": 3.0, "queue": 0.5}
    assert {name: value for name, value in spent([one, two]).items() if value} == {
        "sampling": 4.0,
        "tools": 2.0,
        "queue": 0.5,
    }


def test_a_jobs_diagnosis_is_that_of_all_its_steps() -> None:
    job = JobTimes()
    first = job.add(waiting(90, tools=1.0), [SEARCH])
    job.add(StepTimes(1000.0, 0.0, 1000.0), [])
    assert first["bound"] == "tool"
    assert job.diagnosis().bound == "trainer"
    assert "of the job" in job.diagnosis().sentence


def test_a_resumed_job_knows_its_earlier_steps_from_their_events() -> None:
    job, history = JobTimes(), list[dict[str, Any]]()
    history.append({"step": 0, "valid": {}})
    for step, times in enumerate([waiting(90, tools=9.0, sampling=1.0), waiting(60, tools=4.0)], 1):
        history.append({"step": step, "diagnosis": job.add(times, [SEARCH])})
    history.append({**history[-1], "valid": {"sampled": {}}})  # the validation after step 2 repeats its numbers
    stored = json.loads(json.dumps(history))
    assert JobTimes.from_history(stored).diagnosis() == job.diagnosis()
    assert "(p95 8.1 s, 824 calls)" in job.diagnosis().sentence
