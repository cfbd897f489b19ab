"""What the reader sees at the end, and while the job runs."""

from __future__ import annotations

import dataclasses

import pytest
from rich.console import Console

from examples.shop.agent import Episode, summarise
from examples.shop.report import Both, compare, conversations, table, transcript
from examples.shop.view import Frame, PlainView, age, ledger_line, panel, sparkline


def episode(question: str, reward: float, answer: str = "The answer is 5.") -> Episode:
    row = {"messages": [{"role": "user", "content": question}]}
    return Episode(row, [{"role": "assistant", "content": answer}], calls=1, completion_tokens=8, reward=reward)


def both(*rewards: float) -> Both:
    measured = summarise([episode(f"question {number}", reward) for number, reward in enumerate(rewards)])
    return Both(sampled=measured, greedy=measured)


def test_the_table_names_both_models_and_their_errors() -> None:
    shown = table(both(0.0, 0.4), both(1.0, 0.9))
    assert "0.200 ± 0.200" in shown
    assert "0.950 ± 0.050" in shown


@pytest.mark.parametrize(("theirs", "agrees"), [(0.5, True), (0.95, True), (1.2, False)])
def test_agreement_is_two_standard_errors_of_the_difference(theirs: float, agrees: bool) -> None:
    own = dataclasses.replace(both(0.0, 1.0).sampled, reward_mean=0.5, reward_se=0.15)
    verdict, line = compare("before", own, {"reward_mean": theirs, "reward_se": 0.2, "n": 64})
    assert verdict is agrees
    assert ("OUTSIDE" in line) is not agrees


def test_a_job_without_validation_is_said_so() -> None:
    assert compare("after", both(0.0, 1.0).sampled, None) == (None, "  after: the job reported no validation")


def test_the_conversations_are_three_different_questions_with_the_largest_gain_first() -> None:
    shown = conversations(both(0.5, 0.0, 0.4, 0.3, 0.9), both(1.0, 1.0, 1.0, 1.0, 1.0))
    questions = [line.strip() for line in shown.splitlines() if line.startswith("  question")]
    assert questions == ["question 1", "question 3", "question 2"]


def test_a_transcript_shows_call_result_and_answer() -> None:
    call = {"function": {"name": "lookup", "arguments": '{"item": "old sofa"}'}}
    written = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "20"},
        {"role": "assistant", "content": "The answer\nis 20."},
    ]
    lines = [line.strip() for line in transcript(Episode({}, written, reward=1.0)).splitlines()]
    assert lines == ['lookup({"item": "old sofa"})', "→ 20", "“The answer is 20.”", "reward 1.00"]


def test_a_sparkline_runs_from_zero_to_the_top() -> None:
    assert sparkline([0.0, 0.5, 1.0], 1.0) == "▁▅█"
    assert sparkline([]) == ""
    assert sparkline([0.0]) == "▁"


def test_ages_and_the_ledger_read_as_sentences() -> None:
    assert age(7.9) == "7 s"
    assert age(125) == "2 min 05 s"
    assert ledger_line({"trained": 60, "started": 4, "stale": 0}) == "started 64 = trained 60 + open 4"
    assert ledger_line({}) == "started 0"


def test_the_panel_shows_what_the_job_does_now_and_takes_no_markup_from_it() -> None:
    console = Console(record=True, width=100, force_terminal=True, file=None)
    seen = Frame("ftjob-1", "running", 3, 8, [0.2, 0.6], [0.9], [0.3], "sampling [red]x", 65.0, {"started": 5})
    with console.capture() as captured:
        console.print(panel(seen, ["Created [bold]job"]))
    text = captured.get()
    assert "step 3/8" in text
    assert "sampling [red]x · 1 min 05 s" in text
    assert "Created [bold]job" in text
    assert "+0.40" in text


def test_plain_lines_show_each_event_once(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView()
    view.show(Frame("ftjob-1", "running", events=["one"], seconds=3))
    view.show(Frame("ftjob-1", "running", events=["two"], seconds=70))
    assert capsys.readouterr().out.splitlines() == ["  [3 s] one", "  [1 min 10 s] two"]
