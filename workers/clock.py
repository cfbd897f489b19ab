"""A stopwatch with named phases: for one step, and added up over the job.

Does not cover: what the time means (`workers.diagnosis`), nor time spent inside trajectories, which overlap.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Where the time of a step goes, for the step and summed over the job."""

    job: dict[str, float]
    step: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @contextmanager
    def phase(self, name: str, *, counts_as: str | None = None) -> Iterator[None]:
        """`counts_as`: the phase of the job that it belongs to; "" for none."""
        began = time.monotonic()
        try:
            yield
        finally:
            elapsed = time.monotonic() - began
            self.step[name] = self.step.get(name, 0.0) + elapsed
            if phase := name if counts_as is None else counts_as:
                self.job[phase] = self.job.get(phase, 0.0) + elapsed
