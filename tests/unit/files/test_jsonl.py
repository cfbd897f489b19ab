"""Every line is one JSON object, or it is named with its line and reason."""

from __future__ import annotations

import io

import pytest

from app.files import jsonl


def _check(text: str | bytes) -> jsonl.Report:
    return jsonl.check(io.BytesIO(text.encode() if isinstance(text, str) else text))


def test_objects_and_blank_lines_are_fine() -> None:
    report = _check('{"a": 1}\n\n{"b": "é"}\r\n{"c": []}')
    assert (report.rows, report.bad_count, report.problem()) == (3, 0, None)


def test_a_byte_order_mark_is_accepted() -> None:
    assert _check(b'\xef\xbb\xbf{"a": 1}\n').problem() is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'a': 1}", "not JSON at column 2"),
        ("[1]", "a JSON object is needed, not an array"),
        ("null", "a JSON object is needed, not null"),
        ("true", "a JSON object is needed, not a boolean"),
        ('{"a": NaN}', "NaN is not a number"),
        ('{"a": -Infinity}', "-Infinity is not a number"),
        ('{"a": ' + "9" * 5000 + "}", "a number is too long"),
        ('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_reason(line: str, reason: str) -> None:
    report = _check('{"ok": 1}\n' + line + "\n")
    assert [row.line for row in report.bad] == [2]
    assert reason in report.bad[0].reason
    assert "1 of 2 rows" in (report.problem() or "")


def test_bytes_that_are_not_utf8_are_named() -> None:
    assert "not UTF-8 at byte 8" in (_check(b'{"a": "\xff"}\n').problem() or "")


def test_an_empty_file_is_a_problem() -> None:
    assert "no rows" in (_check("\n \n").problem() or "")


def test_a_line_above_the_limit_is_skipped_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_ROW_BYTES", 16)
    report = _check('{"a": "' + "x" * 100 + '"}\n{"b": 1}\n')
    assert [row.line for row in report.bad] == [1]
    assert report.rows == 2


def test_only_the_first_bad_rows_are_named_and_all_are_counted() -> None:
    report = _check("nope\n" * 25)
    assert (report.bad_count, len(report.bad)) == (25, jsonl.NAMED_ROWS)
    assert "and 15 more" in (report.problem() or "")
