"""A validation error in the words of the request: what, where, and a code."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
import pytest
from pydantic import Field

from app.web.errors import from_validation


class Inner(pydantic.BaseModel, extra="forbid"):
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    rate: float = Field(1.0, gt=0)


class Body(pydantic.BaseModel):
    model: str
    inner: Inner


GOOD = {"model": "m", "inner": {}}


@pytest.mark.parametrize(
    ("change", "param", "code", "says"),
    [
        ({"model": None}, "model", "invalid_type", "Invalid type for 'model'"),
        ({"inner": {"rate": 0}}, "inner.rate", "invalid_value", "greater than 0"),
        ({"inner": {"rat": 1}}, "inner.rat", "unknown_parameter", "Unknown parameter: 'inner.rat'."),
    ],
)
def test_the_first_error_is_named_by_its_path(change: dict[str, object], param: str, code: str, says: str) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        Body.model_validate(GOOD | change)
    error = from_validation([{**first, "loc": ("body", *first["loc"])} for first in caught.value.errors()])
    assert (error.status, error.param, error.code) == (400, param, code)
    assert says in error.message


def test_a_missing_field_is_named() -> None:
    error = from_validation([{"loc": ("body", "model"), "type": "missing", "msg": "Field required"}])
    assert (error.param, error.message) == ("model", "Missing required parameter: 'model'.")
