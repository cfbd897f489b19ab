"""The header values inside a canonical method: sealed for the database, opened for the worker, masked on every answer.

Does not cover: the sealing itself (`app.security.vault`). Headers stand on tools and on graders at any depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from app.net.endpoint import MASK


class Vault(Protocol):
    """The part of `app.security.vault.Vault` used here. `context` binds a sealed value to its job."""

    def seal(self, plaintext: str, context: str) -> str: ...

    def open(self, sealed: str, context: str) -> str: ...


def seal_headers(method: dict[str, Any], vault: Vault, job_id: str) -> dict[str, Any]:
    """A copy fit for `jobs.method`."""
    return _over_headers(method, lambda value: vault.seal(value, job_id))


def open_headers(method: dict[str, Any], vault: Vault, job_id: str) -> dict[str, Any]:
    """A copy with the plain values, for the worker that sends them. Raises the vault's error on a wrong key."""
    return _over_headers(method, lambda value: vault.open(value, job_id))


def mask_headers(method: dict[str, Any]) -> dict[str, Any]:
    """A copy fit for an answer: names stay, values become `***`."""
    return _over_headers(method, lambda value: MASK)


def _over_headers(method: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    reinforcement = dict(method["reinforcement"])
    for part in ("tools", "grader"):
        if part in reinforcement:
            reinforcement[part] = _copy(reinforcement[part], change)
    return {**method, "reinforcement": reinforcement}


def _copy(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, list):
        return [_copy(entry, change) for entry in value]
    if not isinstance(value, dict):
        return value
    copied: dict[str, Any] = {}
    for key, entry in value.items():
        if key == "graders" and isinstance(entry, dict):  # names of parts, one of which may well be "headers"
            copied[key] = {name: _copy(part, change) for name, part in entry.items()}
        elif key == "headers" and isinstance(entry, dict):
            copied[key] = {name: change(str(secret)) for name, secret in entry.items()}
        else:
            copied[key] = _copy(entry, change)
    return copied
