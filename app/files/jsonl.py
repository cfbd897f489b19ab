"""JSONL, row by row in constant memory: every line is one JSON object, or it is named with its reason.

Does not cover: what a row must contain (`app.jobs`): the same file may serve jobs with different tools.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

MAX_ROW_BYTES = 8 * 1024**2
NAMED_ROWS = 10


@dataclass(frozen=True)
class BadRow:
    """`line` counts from 1, as an editor does."""

    line: int
    reason: str


@dataclass(frozen=True)
class Report:
    """`bad` holds the first of them; `bad_count` all."""

    rows: int
    bad: tuple[BadRow, ...]
    bad_count: int

    def problem(self) -> str | None:
        """What is wrong with the file in one line, or None."""
        if self.bad_count:
            named = "; ".join(f"line {row.line}: {row.reason}" for row in self.bad)
            more = f"; and {self.bad_count - len(self.bad)} more" if self.bad_count > len(self.bad) else ""
            return f"{self.bad_count} of {self.rows} rows cannot be read: {named}{more}"
        return None if self.rows else "The file has no rows; it needs one JSON object per line."


def check(file: BinaryIO) -> Report:
    """Read the whole file once. Blocking."""
    count, bad_count = 0, 0
    bad: list[BadRow] = []
    for _, value in rows(file):
        count += 1
        if isinstance(value, BadRow):
            bad_count += 1
            if len(bad) < NAMED_ROWS:
                bad.append(value)
    return Report(count, tuple(bad), bad_count)


def rows(file: BinaryIO) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Line number and object of every line that is not blank; a BadRow in place of what is no object."""
    line = 0
    while raw := file.readline(MAX_ROW_BYTES + 1):
        line += 1
        if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            _skip_line(file)
            yield line, BadRow(line, f"longer than {MAX_ROW_BYTES // 1024**2} MB")
            continue
        if line == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as some editors write it
        if raw.strip():
            yield line, parse(line, raw)


def parse(line: int, raw: bytes) -> dict[str, Any] | BadRow:
    """One row; NaN and Infinity are no JSON, whatever Python thinks."""
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        return BadRow(line, f"not UTF-8 at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return BadRow(line, f"not JSON at column {error.colno}: {error.msg}")
    except _NotANumber as error:
        return BadRow(line, f"not JSON: {error} is not a number")
    except RecursionError:
        return BadRow(line, "nested too deeply")
    except ValueError:  # an integer of more digits than Python converts
        return BadRow(line, "not JSON: a number is too long")
    if not isinstance(value, dict):
        return BadRow(line, f"a JSON object is needed, not {_kind(value)}")
    return value


class _NotANumber(Exception):
    pass


def _refuse(constant: str) -> NoReturn:
    raise _NotANumber(constant)


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _skip_line(file: BinaryIO) -> None:
    while piece := file.readline(MAX_ROW_BYTES):
        if piece.endswith(b"\n"):
            return
