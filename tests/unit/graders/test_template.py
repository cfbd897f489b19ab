"""Placeholders: what they reach, what they insert, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.graders.template import TemplateError, check_template, placeholders, render

ITEM: dict[str, Any] = {
    "name": "pear",
    "items": "a column, not a method",
    "price": 3,
    "tags": ["x", {"deep": "y"}],
    "none": None,
    "messages": [{"role": "user", "content": "How much?"}],
    "braces": "{{item.name}}",
    "with-dash": "d",
}
SAMPLE: dict[str, Any] = {"output_text": "It is 3.", "output_json": {"price": 3}, "output_tools": [], "choices": []}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("plain", "plain"),
        ("{{item.name}}", "pear"),
        ("{{ item.name }}!", "pear!"),
        ("{{\titem.name\n}}", "pear"),
        ("{{item.items}}", "a column, not a method"),
        ("{{item.price}} and {{sample.output_json.price}}", "3 and 3"),
        ("{{item.tags[1].deep}}", "y"),
        ("{{item.messages[0].content}}", "How much?"),
        ("{{item.tags}}", '["x", {"deep": "y"}]'),
        ("{{item.none}}", "null"),
        ("{{item.with-dash}}", "d"),
        ("{{sample.output_text}}", "It is 3."),
        ("{ item.name } {item}", "{ item.name } {item}"),
        ("{{item.braces}}", "{{item.name}}"),
    ],
)
def test_a_template_is_filled_in_once(template: str, text: str) -> None:
    assert render(template, item=ITEM, sample=SAMPLE) == text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{item.colour}}", "no field 'colour'"),
        ("{{item.tags[2]}}", "2 entries"),
        ("{{item.name[0]}}", "not a list"),
        ("{{item.name.upper}}", "no field 'upper'"),
        ("{{item.tags.deep}}", "no field"),
        ("{{sample.output_json.colour}}", "no field"),
        ("{{sample.text}}", "sample has output_text"),
        ("{{row.name}}", "must start with"),
        ("{{}}", "not a path"),
        ("{{item.__class__.__mro__}}", "no field '__class__'"),
        ("{{item['name']}}", "not a path"),
        ("{{item.tags[-1]}}", "not a path"),
        ("{{'a' * 10**9}}", "not a path"),
        ("{{item.name | upper}}", "not a path"),
    ],
)
def test_what_leads_nowhere_is_an_error(template: str, reason: str) -> None:
    with pytest.raises(TemplateError, match=reason):
        render(template, item=ITEM, sample=SAMPLE)


def test_a_row_is_checked_before_any_sample_exists() -> None:
    check_template("{{item.name}} {{sample.output_json.anything}}", ITEM, 7)
    with pytest.raises(TemplateError, match=r"row 7: \{\{item.colour\}\}") as error:
        check_template("{{item.name}} {{ item.colour }}", ITEM, 7)
    assert (error.value.row, error.value.placeholder) == (7, "item.colour")


def test_placeholders_are_listed_in_order() -> None:
    assert placeholders("{{ item.a }}{{sample.output_text}}") == ("item.a", "sample.output_text")


@given(st.text(alphabet="{} item.sample[0]x", max_size=60))
def test_any_text_renders_or_is_a_template_error(template: str) -> None:
    try:
        render(template, item=ITEM, sample=SAMPLE)
    except TemplateError:
        return
