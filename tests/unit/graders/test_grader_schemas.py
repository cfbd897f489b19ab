"""Graders as they are sent in: every kind, and the path of each fault."""

from __future__ import annotations

from typing import Any

import pytest

from app.core.errors import InvalidRequest
from app.graders.schemas import check_row, parse_grader, redacted

CHECK: dict[str, Any] = {
    "type": "string_check",
    "name": "right",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
ENDPOINT: dict[str, Any] = {"type": "endpoint", "url": "https://a.example/g", "headers": {"X-Key": "s3cr3t"}}
MULTI: dict[str, Any] = {
    "type": "multi",
    "name": "both",
    "graders": {"right": CHECK, "judge": ENDPOINT},
    "calculate_output": "0.5 * right + 0.5 * judge",
}


@pytest.mark.parametrize("grader", [CHECK, ENDPOINT, MULTI])
def test_the_shown_form_hides_headers_and_reads_back(grader: dict[str, Any]) -> None:
    spec = parse_grader(grader)
    shown = redacted(spec)
    assert "s3cr3t" not in f"{shown} {spec!r}"
    assert redacted(parse_grader(shown)) == shown
    assert parse_grader(spec.model_dump()) == spec


def test_a_grader_without_a_name_is_named_after_its_kind() -> None:
    assert redacted(parse_grader(ENDPOINT)) == {**ENDPOINT, "name": "endpoint", "headers": {"X-Key": "***"}}


def test_a_list_of_parts_becomes_the_canonical_dict() -> None:
    listed = {**MULTI, "graders": [CHECK, {**ENDPOINT, "name": "judge"}]}
    assert parse_grader(listed) == parse_grader(MULTI)


def test_the_key_of_a_part_is_its_name() -> None:
    spec = parse_grader({**MULTI, "graders": {"right": {**CHECK, "name": "else"}, "judge": ENDPOINT}})
    assert [part["name"] for part in redacted(spec)["graders"].values()] == ["right", "judge"]


def test_the_misspelt_operation_is_read_as_ne() -> None:
    assert redacted(parse_grader({**CHECK, "operation": "neq"}))["operation"] == "ne"


def test_pass_threshold_is_kept_everywhere() -> None:
    parts = {"right": {**CHECK, "pass_threshold": 1}, "judge": ENDPOINT}
    shown = redacted(parse_grader({**MULTI, "pass_threshold": 0.5, "graders": parts}))
    assert (shown["pass_threshold"], shown["graders"]["right"]["pass_threshold"]) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("grader", "param", "said"),
    [
        (None, "", "object"),
        ({}, ".type", "required; supported: endpoint, multi, string_check"),
        ({"type": "python", "source": "x"}, ".type", "grader type 'python' is not supported yet; supported: endpoint"),
        ({"type": ["endpoint"]}, ".type", "not supported"),
        ({**CHECK, "operation": "matches"}, ".operation", "'eq'"),
        ({**CHECK, "inptu": "x"}, ".inptu", "unknown field; known fields: input"),
        ({**CHECK, "input": 3}, ".input", "string"),
        ({**CHECK, "input": "{{row.x}}"}, ".input", "item. or sample."),
        ({key: value for key, value in CHECK.items() if key != "reference"}, ".reference", "required"),
        ({"type": "endpoint"}, ".url", "required"),
        ({**ENDPOINT, "url": "file:///etc/passwd"}, ".url", "http://"),
        ({**ENDPOINT, "rate_limit": 0}, ".rate_limit", "greater than 0"),
        ({**ENDPOINT, "rate_limit": float("inf")}, ".rate_limit", "finite"),
        ({**ENDPOINT, "rate_limit": True}, ".rate_limit", "number"),
        ({**ENDPOINT, "headers": {"X": "s3cr3t\n"}}, ".headers", "printable"),
        ({**ENDPOINT, "headers": {"X": 1}}, ".headers.X", "string"),
        ({**ENDPOINT, "pass_threshold": "1"}, ".pass_threshold", "number"),
        ({**MULTI, "graders": CHECK}, ".graders.type", "grader object"),
        ({**MULTI, "graders": "x"}, ".graders", "object of named graders"),
        ({**MULTI, "graders": {}}, ".graders", "1 to"),
        ({**MULTI, "graders": {"right": MULTI}}, ".graders.right.type", "cannot hold another"),
        ({**MULTI, "graders": {"a-b": CHECK}}, ".graders.a-b", "identifier"),
        ({**MULTI, "graders": {"min": CHECK}}, ".graders.min", "not a function"),
        ({**MULTI, "graders": [{**CHECK, "name": None}]}, ".graders[0].name", "required"),
        ({**MULTI, "graders": [CHECK, CHECK]}, ".graders[1].name", "twice"),
        ({**MULTI, "graders": {"right": {**CHECK, "x": 1}}}, ".graders.right.x", "unknown field"),
        ({**MULTI, "calculate_output": "right + wrong"}, ".calculate_output", "unknown name 'wrong'"),
        ({**MULTI, "calculate_output": "right +"}, ".calculate_output", "too early"),
        ({"type": "multi", "graders": {"right": CHECK}}, ".calculate_output", "required"),
        ({"type": "multi", "calculate_output": "1"}, ".graders", "required"),
    ],
)
def test_a_faulty_grader_is_refused_with_its_path(grader: Any, param: str, said: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_grader(grader, where="grader")
    assert refused.value.param == f"grader{param}"
    assert said in refused.value.message
    assert "s3cr3t" not in refused.value.message


def test_a_row_that_lacks_a_column_is_found_with_the_field_that_wants_it() -> None:
    faults = check_row(parse_grader(MULTI), {"messages": []}, 12)
    assert [(path, str(error)) for path, error in faults] == [
        ("graders.right.reference", "row 12: {{item.answer}} leads nowhere: item has no field 'answer'")
    ]
    assert check_row(parse_grader(MULTI), {"answer": 3}, 1) == []
