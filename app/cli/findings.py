"""One line of `hone doctor`: what was looked at, how it is, and what to do about it.

Does not cover: the looking (`doctor`, `doctor_sampler`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.core.settings import Settings


class Verdict(StrEnum):
    OK = "ok"
    WARNING = "warning"  # works, or will once a job needs it
    PROBLEM = "problem"  # no job can run


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    verdict: Verdict
    detail: str
    fix: str | None = None


Check = Callable[["Settings"], Iterator[Finding]]
