"""Cursor lists as OpenAI has them: `after` + `limit` in, `data` + `has_more` out (contract §1.5).

Does not cover: the SQL; each repository fetches `limit + 1` rows in its own order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    """One page; `has_more` must always be sent, or the SDK keeps asking until it gets an empty page."""

    items: Sequence[T]
    has_more: bool

    @classmethod
    def of(cls, rows: Sequence[T], limit: int) -> Page[T]:
        """From up to `limit + 1` rows."""
        return cls(rows[:limit], len(rows) > limit)
