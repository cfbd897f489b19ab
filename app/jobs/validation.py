"""The two files of a job against its request: every bad row by line and field, counts, duplicates (contract §6).

Does not cover: who runs it and what becomes of the job (`validation_service`), a single row (`rows`). Pure but for the
clock that it is given; it reads rows as a stream and holds one at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from app.files.jsonl import BadRow
from app.jobs.rows import RowChecker, RowSpec

MIN_TRAIN_ROWS, MAX_TRAIN_ROWS = 10, 50_000
MIN_VALID_ROWS, MAX_VALID_ROWS = 1, 1_000
MAX_EVALUATIONS = 20_480  # as many as the largest training step has
MAX_PROBLEMS = 1000
NAMED_PROBLEMS = 5  # in the job's error message; the event has them all


class TooSlow(Exception):
    """Reading went past its deadline."""


@dataclass(frozen=True)
class Problem:
    """`row` is the 1-based line of the file; `field` a path into the row, empty for the line itself."""

    row: int
    field: str
    message: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.field + ' ' if self.field else ''}{self.message}"


@dataclass(frozen=True)
class FileReport:
    """What one file holds. `problems` stops at 1000; `n_problems` goes on counting. `digests`: row content → line."""

    n_rows: int
    problems: tuple[Problem, ...]
    n_problems: int
    bad_rows: int
    used_tools: frozenset[str]
    digests: dict[bytes, int]


@dataclass(frozen=True)
class Refusal:
    """Why the job fails: `error` for the job's row, `data` for the event that lists every bad row."""

    code: str
    message: str
    param: str
    data: dict[str, Any]

    @property
    def error(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "param": self.param}


def validate_rows(
    rows: Iterable[tuple[int, dict[str, Any] | BadRow]], spec: RowSpec, *, late: Callable[[], bool] = lambda: False
) -> FileReport:
    """Check every row. Raises TooSlow as soon as `late()` says so."""
    checker = RowChecker(spec)
    problems: list[Problem] = []
    digests: dict[bytes, int] = {}
    n_rows = n_problems = bad_rows = 0
    for number, row in rows:
        if late():
            raise TooSlow
        n_rows += 1
        if isinstance(row, BadRow):
            found = [("", row.reason)]
        else:
            found = checker.faults(row, number)
            try:
                text = json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
                digests.setdefault(hashlib.blake2b(text.encode(), digest_size=16).digest(), number)
            except ValueError:  # Python reads them, but no tool could be sent this row
                found.append(("", "holds a number beyond the range of a float, or half of a surrogate pair"))
        n_problems += len(found)
        bad_rows += bool(found)
        problems.extend(Problem(number, field, message) for field, message in found[: MAX_PROBLEMS - len(problems)])
    return FileReport(n_rows, tuple(problems), n_problems, bad_rows, frozenset(checker.used), digests)


def refusal(train: FileReport, valid: FileReport, train_id: str, valid_id: str) -> Refusal | None:
    """The fault that ends the job, or None. Bad rows come before counts, training before validation."""
    data = {
        "problems": [
            {"file": file_id, "row": p.row, "field": p.field or None, "message": p.message}
            for file_id, report in ((train_id, train), (valid_id, valid))
            for p in report.problems
        ][:MAX_PROBLEMS],
        "total": train.n_problems + valid.n_problems,
    }
    for kind, file_id, report in (("training", train_id, train), ("validation", valid_id, valid)):
        if report.problems:
            named = "; ".join(str(problem) for problem in report.problems[:NAMED_PROBLEMS])
            rest = report.n_problems - NAMED_PROBLEMS
            more = f"; and {rest} more, see the job's events" if rest > 0 else ""
            rows = f"{report.bad_rows} bad row{'s' if report.bad_rows != 1 else ''}"
            message = f"{kind.capitalize()} file {file_id} has {rows}: {named}{more}"
            return Refusal(f"invalid_{kind}_file", message, f"{kind}_file", data)
    return _counts("Training", train.n_rows, MIN_TRAIN_ROWS, MAX_TRAIN_ROWS) or _counts(
        "Validation", valid.n_rows, MIN_VALID_ROWS, MAX_VALID_ROWS
    )


def too_many_evaluations(rows: int, samples: int) -> Refusal | None:
    """All rollouts of a validation pass are prepared at once, so there is a limit, as a training step has one."""
    if rows * samples <= MAX_EVALUATIONS:
        return None
    param = "method.reinforcement.hyperparameters.eval_samples"
    return Refusal(
        "too_many_evaluations",
        f"{rows} validation rows × {samples} eval_samples are {rows * samples} rollouts in each validation pass, "
        f"at most {MAX_EVALUATIONS} are possible: eval_samples may be {MAX_EVALUATIONS // rows} here",
        param,
        {"rows": rows, "eval_samples": samples},
    )


def warnings(train: FileReport, valid: FileReport, tools: frozenset[str]) -> list[tuple[str, dict[str, Any]]]:
    """What is allowed but is probably a mistake, as (message, data)."""
    found: list[tuple[str, dict[str, Any]]] = []
    unused = sorted(tools - train.used_tools)
    if unused:
        found.append((f"No row of the training file offers the job's tool {', '.join(unused)}", {"tools": unused}))
    shared = sorted((valid.digests[digest], train.digests[digest]) for digest in valid.digests.keys() & train.digests)
    if shared:
        pairs = [{"validation_row": ours, "training_row": theirs} for ours, theirs in shared[:100]]
        message = (
            f"{len(shared)} of {valid.n_rows} validation rows also stand in the training file: "
            "their reward says little about new rows"
        )
        found.append((message, {"rows": pairs}))
    return found


def _counts(name: str, n: int, least: int, most: int) -> Refusal | None:
    if n < least:
        wrong = f"must have at least {least}"
    elif n > most:
        wrong = f"may have at most {most}"
    else:
        return None
    message = f"{name} file has {n} example(s), {wrong}"
    return Refusal("invalid_n_examples", message, f"{name.lower()}_file", {"examples": n})
