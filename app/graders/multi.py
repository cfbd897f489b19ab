"""`multi`: several graders and a formula over their scores (contract §5.7).

Does not cover: nesting, which the contract forbids; the formula language (`formula`).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import SerializeAsAny

from app.core.errors import InvalidRequest
from app.graders.base import Grade, Grader, GraderSpec, InvalidScore, ParsePart, Sample, Workshop
from app.graders.formula import FUNCTIONS, FormulaError, parse_formula
from app.tools.http import CallContext

MAX_PARTS = 64
_IDENTIFIER = re.compile(r"[A-Za-z_]\w{0,63}", re.ASCII)


class MultiSpec(GraderSpec):
    """The wire form. A list of named graders is accepted and becomes the canonical dict."""

    type: Literal["multi"]
    graders: dict[str, SerializeAsAny[GraderSpec]]
    calculate_output: str

    @classmethod
    def prepare(cls, fields: dict[str, Any], where: str, parse_part: ParsePart) -> dict[str, Any]:
        """Read the parts and check the formula against their names."""
        if "graders" not in fields:
            return fields
        path = f"{where}.graders"
        parts = {
            name: parse_part(value, place)
            for name, value, place in _named(fields["graders"], path)
            if _usable(name, place)
        }
        text = fields.get("calculate_output")
        if isinstance(text, str):
            try:
                parse_formula(text, parts)
            except FormulaError as error:
                param = f"{where}.calculate_output"
                raise InvalidRequest(f"{param}: {error}", param=param) from None
        return {**fields, "graders": parts}

    def build(self, workshop: Workshop) -> Grader:
        """Builds every part from the same workshop."""
        return MultiGrader(self, {name: part.build(workshop) for name, part in self.graders.items()})

    def secrets(self) -> list[Mapping[str, str]]:
        """Of all parts."""
        return [headers for part in self.graders.values() for headers in part.secrets()]

    def templates(self) -> dict[str, str]:
        """The templates of all parts, under `graders.<name>`."""
        return {
            f"graders.{name}.{path}": text
            for name, part in self.graders.items()
            for path, text in part.templates().items()
        }


def _named(value: object, where: str) -> list[tuple[str, dict[str, Any], str]]:
    """(name, grader with that name, path) of each part, from a dict or a list."""
    if isinstance(value, Mapping):
        pairs = [(str(name), part, f"{where}.{name}") for name, part in value.items()]
    elif isinstance(value, list):
        pairs = [(_own_name(part, f"{where}[{i}]"), part, f"{where}[{i}]") for i, part in enumerate(value)]
    else:
        raise InvalidRequest(f"{where} must be an object of named graders", param=where)
    if not 1 <= len(pairs) <= MAX_PARTS:
        raise InvalidRequest(f"{where} must hold 1 to {MAX_PARTS} graders", param=where)
    named = []
    seen: set[str] = set()
    for name, part, place in pairs:
        if not isinstance(part, Mapping):
            raise InvalidRequest(f"{place} must be a grader object", param=place)
        if part.get("type") == "multi":
            raise InvalidRequest(f"{place}: a multi grader cannot hold another one", param=f"{place}.type")
        if name in seen:
            raise InvalidRequest(f"{place}.name: {name!r} is given twice", param=f"{place}.name")
        seen.add(name)
        named.append((name, {**part, "name": name}, place))
    return named


def _own_name(part: object, where: str) -> str:
    name = part.get("name") if isinstance(part, Mapping) else None
    if not isinstance(name, str):
        raise InvalidRequest(f"{where}.name is required: the formula refers to it", param=f"{where}.name")
    return name


def _usable(name: str, where: str) -> bool:
    if not _IDENTIFIER.fullmatch(name) or name in FUNCTIONS:
        rule = "must be an identifier (letters, digits, _) and not a function, so that the formula can use it"
        raise InvalidRequest(f"{where}: the name {name[:64]!r} {rule}", param=where)
    return True


class MultiGrader:
    """Grades the parts at the same time; the first failure of a part is the failure of the whole."""

    def __init__(self, spec: MultiSpec, parts: Mapping[str, Grader]) -> None:
        self._name = spec.name
        self._parts = parts
        self._formula = parse_formula(spec.calculate_output, parts)

    async def grade(
        self, sample: Sample, item: Mapping[str, Any], context: CallContext, *, deadline: float | None = None
    ) -> Grade:
        """The formula's value over the parts' scores. Raises what a part raised, or InvalidScore of the formula."""
        started = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {
                    name: group.create_task(part.grade(sample, item, context, deadline=deadline))
                    for name, part in self._parts.items()
                }
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        grades = {name: task.result() for name, task in tasks.items()}
        scores = {name: grade.score for name, grade in grades.items()}
        try:
            score = self._formula(scores)
        except FormulaError as error:
            raise InvalidScore(self._name, str(error)) from None
        reasons = [f"{name}: {grade.reason}" for name, grade in grades.items() if grade.reason]
        return Grade(
            score=score,
            sub_scores=scores,
            seconds=time.monotonic() - started,
            attempts=max(grade.attempts for grade in grades.values()),
            reason="; ".join(reasons) or None,
            extra={name: dict(grade.extra) for name, grade in grades.items() if grade.extra},
        )
