"""The wire form of a job's tools (contract §7.2): names, where they answer, secret headers.

Does not cover: the JSON Schema of a tool's arguments, which stands in each dataset row (`app.files`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from app.core.errors import InvalidRequest
from app.net.endpoint import MASK, Mask, check_headers, check_url
from app.tools.http import ToolEndpoint

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

EndpointUrl = Annotated[str, AfterValidator(check_url)]
SecretHeaders = Annotated[dict[str, str], AfterValidator(check_headers)]


def check_name(name: str) -> str:
    """A function name as the contract allows it (§6), or ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError("must be 1 to 64 characters from letters, digits, _ and -")
    return name


class ToolSpec(BaseModel):
    """One tool of a job. Keys that we do not know are kept and echoed, as the hosted service does."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: Annotated[str, AfterValidator(check_name)]
    server_url: EndpointUrl
    headers: SecretHeaders = Field(default_factory=dict, repr=False)

    def endpoint(self, mask: Mask) -> ToolEndpoint:
        """The domain value that `call_tool` takes. mask: for the secrets of the whole job."""
        return ToolEndpoint(self.name, self.server_url, self.headers, mask)

    def redacted(self) -> dict[str, Any]:
        """The canonical wire form with every header value masked."""
        return {**self.model_dump(), "headers": dict.fromkeys(self.headers, MASK)}


def parse_tools(objects: object, *, where: str = "method.reinforcement.tools") -> tuple[ToolSpec, ...]:
    """Read the job's tool list. Raises InvalidRequest whose param is a path such as `….tools[1].server_url`."""
    if objects is None:
        return ()
    if not isinstance(objects, Sequence) or isinstance(objects, str):
        raise InvalidRequest(f"{where} must be a list of tools", param=where)
    if len(objects) > MAX_TOOLS:
        raise InvalidRequest(f"{where} has {len(objects)} tools; at most {MAX_TOOLS} are allowed", param=where)
    tools = tuple(_tool(value, f"{where}[{index}]") for index, value in enumerate(objects))
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in seen:
            param = f"{where}[{index}].name"
            raise InvalidRequest(f"{param}: the tool {tool.name!r} is given twice", param=param)
        seen.add(tool.name)
    return tools


def _tool(value: object, where: str) -> ToolSpec:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{where} must be an object", param=where)
    fields = {key: entry for key, entry in value.items() if not (key == "headers" and entry is None)}
    if fields.get("type") == "mcp":
        raise InvalidRequest(f"{where}.type: MCP tools are not supported yet", param=f"{where}.type")
    if "url" in fields:  # the short request shape; `server_url` is the official name
        alias = fields.pop("url")
        if fields.setdefault("server_url", alias) != alias:
            param = f"{where}.url"
            raise InvalidRequest(f"{param} and {where}.server_url differ; send one of them", param=param)
    try:
        return ToolSpec.model_validate(fields)
    except ValidationError as error:
        raise refusal(error, where, known=ToolSpec.model_fields) from None


def refusal(error: ValidationError, where: str, known: Mapping[str, object]) -> InvalidRequest:
    """The first fault of a pydantic error as a 400 with its path. It never quotes the input, which may be a secret."""
    fault = error.errors(include_url=False, include_input=False)[0]
    param = where + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        reason = f"unknown field; known fields: {', '.join(sorted(known))}"
    elif fault["type"] == "missing":
        reason = "is required"
    else:
        reason = fault["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"{param}: {reason}", param=param)
