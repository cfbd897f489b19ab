"""Reading a grader from a request, checking it against rows, and showing it again without its secrets.

Does not cover: the fields of each kind, which stand beside its grader; short request shapes (`app.jobs.shapes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from app.core.errors import InvalidRequest
from app.graders.base import GraderSpec
from app.graders.build import KINDS
from app.graders.template import TemplateError, check_template, placeholders
from app.net.endpoint import MASK
from app.tools.schemas import refusal

__all__ = ["GraderSpec", "check_row", "parse_grader", "redacted"]


def parse_grader(obj: object, *, where: str = "method.reinforcement.grader") -> GraderSpec:
    """Read one grader. Raises InvalidRequest whose param is the path of the field, such as `….graders.a.url`."""
    return _parse(obj, where)


def _parse(obj: object, where: str) -> GraderSpec:
    if not isinstance(obj, Mapping):
        raise InvalidRequest(f"{where} must be a grader object", param=where)
    kind = obj.get("type")
    if not isinstance(kind, str) or kind not in KINDS:
        what = f"grader type {str(kind)[:64]!r} is not supported yet" if kind else f"{where}.type is required"
        raise InvalidRequest(f"{what}; supported: {', '.join(KINDS)}", param=f"{where}.type")
    model = KINDS[kind]
    # A null stands for "not given": clients that echo a job send every optional field.
    fields = {str(key): value for key, value in obj.items() if value is not None}
    fields.setdefault("name", kind)
    try:
        spec = model.model_validate(model.prepare(fields, where, _parse))
    except ValidationError as error:
        raise refusal(error, where, known=model.model_fields) from None
    for path in spec.template_fields:
        try:
            placeholders(getattr(spec, path))
        except TemplateError as error:
            raise InvalidRequest(f"{where}.{path}: {error}", param=f"{where}.{path}") from None
    return spec


def check_row(spec: GraderSpec, row: Mapping[str, Any], row_number: int) -> list[tuple[str, TemplateError]]:
    """Every `item` placeholder that leads nowhere in this row, with the grader's field that holds it."""
    faults = []
    for path, template in spec.templates().items():
        try:
            check_template(template, row, row_number)
        except TemplateError as error:
            faults.append((path, error))
    return faults


def redacted(spec: GraderSpec) -> dict[str, Any]:
    """The canonical wire form with every header value masked; fields that were not given are left out."""
    return _masked(spec.model_dump(exclude_none=True))


def _masked(shown: dict[str, Any]) -> dict[str, Any]:
    if isinstance(shown.get("headers"), dict):
        shown["headers"] = dict.fromkeys(shown["headers"], MASK)
    if isinstance(shown.get("graders"), dict):
        shown["graders"] = {name: _masked(part) for name, part in shown["graders"].items()}
    return shown
