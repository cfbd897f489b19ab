"""The tools of a job as they are sent in."""

from __future__ import annotations

from typing import Any

import pytest

from app.core.errors import InvalidRequest
from app.net.endpoint import Mask
from app.tools.schemas import parse_tools

TOOL: dict[str, Any] = {"name": "search", "server_url": "https://a.example/s", "headers": {"Authorization": "s3cr3t"}}


def test_a_tool_keeps_its_extras_and_hides_its_headers() -> None:
    (tool,) = parse_tools([{**TOOL, "max_rps": 5}])
    assert tool.redacted() == {**TOOL, "headers": {"Authorization": "***"}, "max_rps": 5}
    assert tool.endpoint(Mask()).headers == {"Authorization": "s3cr3t"}
    assert "s3cr3t" not in repr(tool)


def test_the_short_shape_gives_the_same_tool() -> None:
    short = {"name": "search", "url": TOOL["server_url"], "headers": TOOL["headers"]}
    assert parse_tools([short]) == parse_tools([TOOL])


def test_no_tools_and_null_headers_are_fine() -> None:
    assert parse_tools(None) == parse_tools([]) == ()
    assert parse_tools([{**TOOL, "headers": None}])[0].headers == {}


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ("x", ""),
        ({}, ""),
        (["x"], "[0]"),
        ([{**TOOL, "name": "a b"}], "[0].name"),
        ([{**TOOL, "name": "a" * 65}], "[0].name"),
        ([{"server_url": "http://a"}], "[0].name"),
        ([{"name": "a"}], "[0].server_url"),
        ([TOOL, {**TOOL, "name": "b", "server_url": "gopher://s3cr3t"}], "[1].server_url"),
        ([{**TOOL, "url": "https://other"}], "[0].url"),
        ([{**TOOL, "headers": {"A": 1}}], "[0].headers.A"),
        ([{**TOOL, "headers": {"A": "s3cr3t\n"}}], "[0].headers"),
        ([{**TOOL, "type": "mcp"}], "[0].type"),
        ([TOOL, TOOL], "[1].name"),
    ],
)
def test_a_faulty_tool_is_refused_with_its_path(tools: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_tools(tools, where="tools")
    assert refused.value.param == f"tools{param}"
    assert refused.value.message.startswith("tools")
    assert "s3cr3t" not in refused.value.message
