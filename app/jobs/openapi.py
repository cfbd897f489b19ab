"""The create body as it stands in openapi.yaml; the route reads the raw JSON so that every alias of §2.3 passes.

Does not cover: validation (`parse`). Built from the same models, so that limits are written once.
"""

from __future__ import annotations

from typing import Any

from app.jobs.schemas import CreateJob, HoneOptions, Reinforcement


def _inline(schema: Any, defs: dict[str, Any]) -> Any:
    """`$ref`s into pydantic's `$defs` written out: an operation has no place for definitions."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inline(defs[schema["$ref"].rsplit("/", 1)[1]], defs)
        return {key: _inline(value, defs) for key, value in schema.items() if key != "$defs"}
    return [_inline(entry, defs) for entry in schema] if isinstance(schema, list) else schema


def _schema(model: type[CreateJob] | type[HoneOptions] | type[Reinforcement]) -> dict[str, Any]:
    made = model.model_json_schema()
    inlined: dict[str, Any] = _inline(made, made.get("$defs", {}))
    return inlined


def create_body() -> dict[str, Any]:
    """The request body of POST /v1/fine_tuning/jobs."""
    schema = _schema(CreateJob)
    schema["title"] = "CreateFineTuningJob"
    schema["properties"]["method"] = {
        "type": "object",
        "required": ["type", "reinforcement"],
        "properties": {"type": {"const": "reinforcement"}, "reinforcement": _schema(Reinforcement)},
    }
    schema["properties"]["hone"] = _schema(HoneOptions)
    schema["required"] = [*schema["required"], "validation_file", "method"]
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


CREATE_BODY = create_body()
