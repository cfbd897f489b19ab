"""Is the policy that a sampler serves under a name the one that the trainer trained? Three gates over a canary.

`files`: what is on disk, before anything is loaded. `gates`: the figures and their verdicts. `canary`: scoring a
sampler, alone where possible. `evidence`: all three gates on one sampler.
Does not cover: what follows from it (`workers.publication`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.net.endpoint import show_url


class Unproved(Exception):
    """A version that a sampler could not prove; `figures` are those of the gates, JSON without NaN."""

    def __init__(self, message: str, *, sampler: str, figures: Mapping[str, Any] | None = None) -> None:
        self.sampler = show_url(sampler)  # without the credentials that it may hold
        super().__init__(f"{message} ({self.sampler})")
        self.reason = message
        self.figures = dict(figures or {})
