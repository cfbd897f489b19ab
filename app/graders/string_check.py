"""`string_check`: 1 or 0 by comparing two rendered texts (contract §5.2).

Does not cover: nearness of texts (a similarity grader is another kind).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from app.graders.base import Grade, Grader, GraderSpec, InvalidScore, ParsePart, Sample, Workshop
from app.graders.template import TemplateError, render
from app.tools.http import CallContext

OPERATIONS: Mapping[str, Callable[[str, str], bool]] = {
    "eq": lambda text, reference: text == reference,
    "ne": lambda text, reference: text != reference,
    "like": lambda text, reference: reference in text,
    "ilike": lambda text, reference: reference.casefold() in text.casefold(),
}


class StringCheckSpec(GraderSpec):
    """The wire form; the misspelling `neq` of one guide is read as `ne`."""

    template_fields: ClassVar[tuple[str, ...]] = ("input", "reference")

    type: Literal["string_check"]
    input: str
    reference: str
    operation: Literal["eq", "ne", "like", "ilike"]

    @classmethod
    def prepare(cls, fields: dict[str, Any], where: str, parse_part: ParsePart) -> dict[str, Any]:
        """Map the alias `neq`."""
        return {**fields, "operation": "ne"} if fields.get("operation") == "neq" else fields

    def build(self, workshop: Workshop) -> Grader:
        """Needs nothing from the workshop."""
        return StringCheck(self)


class StringCheck:
    """Pure and immediate."""

    def __init__(self, spec: StringCheckSpec) -> None:
        self._spec = spec

    async def grade(
        self, sample: Sample, item: Mapping[str, Any], context: CallContext, *, deadline: float | None = None
    ) -> Grade:
        """1.0 or 0.0. A path into the sample that leads nowhere is the model's doing: 0. One into the row is not."""
        spec, shown = self._spec, sample.as_dict()
        try:
            text, reference = (render(part, item=item, sample=shown) for part in (spec.input, spec.reference))
        except TemplateError as error:
            if error.placeholder.startswith("sample"):
                return Grade(0.0, reason=str(error), extra={"invalid_variable_error": True})
            raise InvalidScore(spec.name, str(error)) from None
        return Grade(float(OPERATIONS[spec.operation](text, reference)))
