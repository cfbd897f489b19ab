"""Dataset rows against a job: each fault by line and field. Does not cover: who reads the file."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from app.files import jsonl
from app.graders.schemas import parse_grader
from app.jobs.rows import RowSpec
from app.jobs.validation import (
    MAX_PROBLEMS,
    FileReport,
    TooSlow,
    refusal,
    too_many_evaluations,
    validate_rows,
    warnings,
)

SPEC = RowSpec(
    tools=frozenset({"lookup", "search"}),
    grader=parse_grader(
        {
            "type": "string_check",
            "name": "exact",
            "input": "{{sample.output_text}}",
            "reference": "{{ item.answer }}",
            "operation": "eq",
        }
    ),
)
USER = {"role": "user", "content": "How much is the hat?"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "lookup", "arguments": '{"item": "hat"}'}}
TOOL = {"type": "function", "function": {"name": "lookup", "parameters": {"type": "object", "properties": {}}}}


def row(**changes: Any) -> dict[str, Any]:
    made = {"messages": [USER], "tools": [TOOL], "answer": "84", **changes}
    return {key: value for key, value in made.items() if value is not ...}


def function(**changes: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "lookup", **changes}}


def report(*rows: Any) -> FileReport:
    text = "\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in rows)
    return validate_rows(jsonl.rows(io.BytesIO(text.encode())), SPEC)


def test_a_row_with_worked_examples_is_right() -> None:
    shots = [
        {"role": "system", "content": "Use the tool."},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "84"},
        {"role": "assistant", "content": "84"},
        {"role": "user", "content": [{"type": "text", "text": "And the scarf?"}]},
    ]
    assert report(row(messages=shots, parallel_tool_calls=False)).problems == ()


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (row(messages=...), "messages"),
        (row(messages=[]), "messages"),
        (row(messages="hi"), "messages"),
        (row(messages=["hi", USER]), "messages[0]"),
        (row(messages=[{"role": "robot", "content": "x"}, USER]), "messages[0].role"),
        (row(messages=[{"content": "x"}, USER]), "messages[0].role"),
        (row(messages=[USER, {"role": "assistant", "content": "84"}]), "messages[1].role"),
        (row(messages=[{"role": "user", "content": None}]), "messages[0].content"),
        (row(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content[0]"),
        (row(messages=[{"role": "user", "content": "x", "tool_calls": [CALL]}]), "messages[0].tool_calls"),
        (
            row(messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}, USER]),
            "messages[0].tool_calls[0].function.arguments",
        ),
        (row(tools={}), "tools"),
        (row(tools=[{"name": "lookup"}]), "tools[0]"),
        (row(tools=[function(name="weather")]), "tools[0].function.name"),
        (row(tools=[function(name="a b")]), "tools[0].function.name"),
        (row(tools=[function(), function()]), "tools[1].function.name"),
        (row(tools=[function(parameters={"type": "objekt"})]), "tools[0].function.parameters"),
        (row(tools=[function(parameters={"$ref": "http://127.0.0.1:1/s"})]), "tools[0].function.parameters"),
        (row(tools=[function(parameters=[])]), "tools[0].function.parameters"),
        (row(tools=[function(description=3)]), "tools[0].function.description"),
        (row(parallel_tool_calls="no"), "parallel_tool_calls"),
        (row(answer=...), "grader.reference"),
        ("{", ""),
        ("[]", ""),
        ('{"messages": [{"role": "user", "content": "\\ud800"}], "answer": "x"}', ""),
        ('{"messages": [{"role": "user", "content": "x"}], "answer": 1e999}', ""),
    ],
)
def test_a_fault_is_named_by_line_and_field(bad: Any, field: str) -> None:
    found = report(row(), bad, row())
    assert [(problem.row, problem.field) for problem in found.problems] == [(2, field)]
    assert found.n_rows == 3
    assert found.bad_rows == 1


def test_a_tool_that_the_job_lacks_is_named_beside_those_it_has() -> None:
    (problem,) = report(row(tools=[function(name="weather")])).problems
    assert "'weather'" in problem.message
    assert "lookup, search" in problem.message


def test_a_schema_nested_too_deeply_or_too_large_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(50):
        deep = {"properties": {"a": deep}}
    large = {"description": "x" * 70_000}
    for schema in (deep, large):
        (problem,) = report(row(tools=[function(parameters=schema)])).problems
        assert problem.field == "tools[0].function.parameters"


def test_lines_are_counted_as_an_editor_counts_them() -> None:
    found = report(row(), "", "", "nonsense")
    assert found.n_rows == 2
    assert found.problems[0].row == 4


def test_problems_stop_at_a_thousand_but_are_counted() -> None:
    found = report(*["[]"] * (MAX_PROBLEMS + 5))
    assert len(found.problems) == MAX_PROBLEMS
    assert found.n_problems == MAX_PROBLEMS + 5


def test_the_refusal_names_the_first_rows_and_lists_all() -> None:
    refused = refusal(report(*["[]"] * 7, *[row()] * 10), report(row(messages=...)), "file-t", "file-v")
    assert refused is not None
    assert refused.code == "invalid_training_file"
    assert refused.param == "training_file"
    assert "row 1:" in refused.message
    assert "row 5:" in refused.message
    assert "row 6:" not in refused.message
    assert "2 more" in refused.message
    assert refused.data["total"] == 8
    assert refused.data["problems"][-1] == {
        "file": "file-v",
        "row": 1,
        "field": "messages",
        "message": "is missing",
    }


def test_a_bad_validation_file_is_its_own_code() -> None:
    refused = refusal(report(*[row()] * 10), report("{}"), "file-t", "file-v")
    assert refused is not None
    assert (refused.code, refused.param) == ("invalid_validation_file", "validation_file")


def test_a_validation_pass_has_a_limit_that_is_told_with_what_would_fit() -> None:
    assert too_many_evaluations(1000, 20) is None
    refused = too_many_evaluations(1000, 21)
    assert refused is not None
    assert refused.param == "method.reinforcement.hyperparameters.eval_samples"
    assert "21000 rollouts" in refused.message
    assert "eval_samples may be 20 here" in refused.message


def test_too_few_examples_have_the_recorded_message() -> None:
    refused = refusal(report(*[row()] * 9), report(row()), "file-t", "file-v")
    assert refused is not None
    assert refused.error == {
        "code": "invalid_n_examples",
        "message": "Training file has 9 example(s), must have at least 10",
        "param": "training_file",
    }
    empty = refusal(report(*[row()] * 10), report(""), "file-t", "file-v")
    assert empty is not None
    assert empty.param == "validation_file"


def test_shared_rows_and_unused_tools_are_warnings() -> None:
    train, valid = report(row(answer="1"), row(answer="2")), report(row(answer="3"), row(answer="2"))
    assert refusal(report(*[row()] * 10), valid, "a", "b") is None
    unused, shared = warnings(train, valid, SPEC.tools)
    assert unused[1] == {"tools": ["search"]}
    assert shared[1] == {"rows": [{"validation_row": 2, "training_row": 2}]}


def test_reading_stops_at_its_deadline() -> None:
    with pytest.raises(TooSlow):
        validate_rows(jsonl.rows(io.BytesIO(b"{}\n{}")), SPEC, late=lambda: True)
