"""Every accepted way to write `method` → the canonical one, on raw JSON (contract §2.3).

Does not cover: whether the values are right (`parse`). The tool alias `url` and grader aliases belong to their rooms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.core.errors import InvalidRequest

_OURS = ("reinforcement", "rft")
_OTHERS = ("supervised", "dpo")


def reinforcement_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """The raw `method.reinforcement` object of a create body. Raises InvalidRequest with the path at fault.

    Accepted: `method={"type": "reinforcement", "reinforcement": {…}}`, the same with `rft`, and `method="rft"` with the
    configuration at the top level under `rft`.
    """
    method = body.get("method")
    top = body.get("rft")
    if isinstance(method, str):
        _check_type(method, "method")
        if top is None:
            raise InvalidRequest(
                'method "rft" needs its configuration in rft={grader, tools, hyperparameters, …}; with the OpenAI SDK '
                'send it as extra_body={"rft": {…}}, or use method={"type": "reinforcement", "reinforcement": {…}}',
                param="rft",
            )
        return _object(top, "rft")
    if method is None:
        if top is None:
            raise InvalidRequest('method is required: {"type": "reinforcement", "reinforcement": {…}}', param="method")
        return _object(top, "rft")
    if not isinstance(method, dict):
        raise InvalidRequest("method must be an object", param="method")
    return _from_object(method, top)


def _from_object(method: dict[str, Any], top: object) -> dict[str, Any]:
    kind = method.get("type")
    if kind is None:
        raise InvalidRequest('method.type is required; send "reinforcement"', param="method.type")
    _check_type(kind, "method.type")
    for key in method:
        if key not in ("type", *_OURS, *_OTHERS):
            raise InvalidRequest(f"method.{key}: unknown field", param=f"method.{key}")
        if key in _OTHERS and method[key] is not None:
            raise InvalidRequest(f"method.{key} does not go with method.type {kind!r}", param=f"method.{key}")
    given = [
        (where, value)
        for where, value in (
            ("method.reinforcement", method.get("reinforcement")),
            ("method.rft", method.get("rft")),
            ("rft", top),
        )
        if value is not None
    ]
    if not given:
        raise InvalidRequest("method.reinforcement is required", param="method.reinforcement")
    if len(given) > 1:
        names = " and ".join(where for where, _ in given)
        raise InvalidRequest(f"{names} are both given; send one of them", param=given[-1][0])
    return _object(given[0][1], given[0][0])


def _check_type(kind: object, param: str) -> None:
    if kind in _OTHERS:
        raise InvalidRequest(
            f'{kind} fine-tuning is not available here; method.type must be "reinforcement"', param="method.type"
        )
    if kind not in _OURS:
        raise InvalidRequest(f'{param} must be "reinforcement"', param=param)


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} must be an object", param=where)
    return value
