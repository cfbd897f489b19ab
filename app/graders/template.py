"""`{{ item.a.b[0] }}` and `{{ sample.output_text }}` in a grader's texts (contract §5.1).

Does not cover: anything a template language would add. A placeholder is a path into JSON and nothing else: no calls, no
attributes, and what it inserts is never rendered again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

NAMESPACES = ("item", "sample")
SAMPLE_KEYS = ("output_text", "output_json", "output_tools", "choices")

_PLACEHOLDER = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_PATH = re.compile(r"(?P<root>[A-Za-z_]\w*)(?P<rest>(?:\.[\w$-]+|\[\d{1,9}\])*)")
_STEP = re.compile(r"\.(?P<key>[\w$-]+)|\[(?P<index>\d+)\]")


class TemplateError(ValueError):
    """A placeholder that cannot be read, or leads nowhere. `placeholder` is its text; `row` the dataset row from 1."""

    def __init__(self, placeholder: str, reason: str, row: int | None = None) -> None:
        self.placeholder = placeholder
        self.reason = reason
        self.row = row
        super().__init__(f"{'' if row is None else f'row {row}: '}{{{{{placeholder}}}}} {reason}")


def placeholders(template: str) -> tuple[str, ...]:
    """Every placeholder's path in order, without the outer spaces. Raises TemplateError on one that is no path."""
    found = tuple(match[1].strip() for match in _PLACEHOLDER.finditer(template))
    for path in found:
        _steps(path)
    return found


def render(template: str, *, item: Mapping[str, Any], sample: Mapping[str, Any]) -> str:
    """Fill in the template. Strings go in as they are, everything else as JSON text. Raises TemplateError."""
    roots = {"item": item, "sample": sample}

    def fill(match: re.Match[str]) -> str:
        value = _lookup(match[1].strip(), roots)
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    return _PLACEHOLDER.sub(fill, template)


def check_template(template: str, row: Mapping[str, Any], row_number: int) -> None:
    """Check that every `item` placeholder leads somewhere in this dataset row. Raises TemplateError with the row.

    The model's own output is not known yet, so of a `sample` path only the first key is checked.
    """
    for path in placeholders(template):
        if path.startswith("item"):
            try:
                _lookup(path, {"item": row})
            except TemplateError as error:
                raise TemplateError(error.placeholder, error.reason, row_number) from None


def _steps(path: str) -> tuple[str, list[str | int]]:
    match = _PATH.fullmatch(path)
    if match is None:
        raise TemplateError(path, "is not a path such as item.name or item.list[0].name")
    root = match["root"]
    steps: list[str | int] = [
        int(step["index"]) if step["index"] is not None else step["key"] for step in _STEP.finditer(match["rest"])
    ]
    if root not in NAMESPACES:
        raise TemplateError(path, "must start with item. or sample.")
    if root == "sample" and steps and steps[0] not in SAMPLE_KEYS:
        raise TemplateError(path, f"is unknown; sample has {', '.join(SAMPLE_KEYS)}")
    return root, steps


def _lookup(path: str, roots: Mapping[str, Any]) -> Any:
    root, steps = _steps(path)
    value, seen = roots[root], root
    for step in steps:
        if isinstance(step, int):
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise TemplateError(path, f"leads nowhere: {seen} is not a list")
            if step >= len(value):
                raise TemplateError(path, f"leads nowhere: {seen} has {len(value)} entries")
            value, seen = value[step], f"{seen}[{step}]"
        else:
            if not isinstance(value, Mapping) or step not in value:
                raise TemplateError(path, f"leads nowhere: {seen} has no field {step!r}")
            value, seen = value[step], f"{seen}.{step}"
    return value
