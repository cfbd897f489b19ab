"""The lines of a dataset file as every reader must count them: 1-based line numbers, blank lines are no rows.

Does not cover: whether a row is right (`rows`). The supervisor reads validated files with `read_rows`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, BinaryIO

MAX_LINE_BYTES = 4 * 1024 * 1024
_BOM = b"\xef\xbb\xbf"


class BadLine(ValueError):
    """A line that holds no JSON object; the message says why."""


def lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(line number, line) of every line that is not blank; None in place of a line above 4 MiB, which is skipped."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            yield number, None
            continue
        line = (line.removeprefix(_BOM) if number == 1 else line).strip()
        if line:
            yield number, line


def parse_line(line: bytes | None) -> dict[str, Any]:
    """The row in a line. Raises BadLine, also for NaN, numbers beyond a float and lone surrogates."""
    if line is None:
        raise BadLine(f"is longer than {MAX_LINE_BYTES // 1024**2} MiB")
    try:
        row = json.loads(line, parse_constant=_no_constant, parse_float=_finite)
        if b"\\u" in line:  # only an escape can make a lone surrogate
            json.dumps(row, ensure_ascii=False).encode()
    except RecursionError:
        raise BadLine("is nested too deeply") from None
    except UnicodeError:
        raise BadLine("is not valid UTF-8") from None
    except ValueError as error:
        raise BadLine(f"is not valid JSON: {str(error)[:120]}") from None
    if not isinstance(row, dict):
        raise BadLine("is not a JSON object")
    return row


def read_rows(file: BinaryIO) -> list[dict[str, Any]]:
    """All rows of a validated file; the list index is `rollouts.row`. Raises BadLine if the file changed since."""
    return [parse_line(line) for _, line in lines(file)]


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large")
    return value
