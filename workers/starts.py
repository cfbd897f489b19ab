"""Supervisors that end before they took their job: said once, and tried again at growing intervals.

Does not cover: a run that crashed, which its crash budget bounds (`workers.supervisor`). What ends a supervisor before
its claim is the host's fault (a broken installation, no database), so the job is not failed for it and waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

PUT_BACK = 75  # a supervisor's exit code: it had the job and put it back, or failed it by a crash (EX_TEMPFAIL)
FIRST_S = 1.0
LONGEST_S = 60.0


@dataclass
class Starts:
    """One per door. `clock`: seconds, monotonic."""

    clock: Callable[[], float] = time.monotonic
    _failures: dict[str, int] = field(default_factory=dict)
    _until: dict[str, float] = field(default_factory=dict)

    def may_start(self, job_id: str) -> bool:
        return self.clock() >= self._until.get(job_id, 0.0)

    def failed(self, job_id: str) -> tuple[int, float]:
        """How many in a row by now, and the seconds until the next."""
        count = self._failures[job_id] = self._failures.get(job_id, 0) + 1
        wait = min(LONGEST_S, FIRST_S * 2.0 ** (count - 1))
        self._until[job_id] = self.clock() + wait
        return count, wait

    def took(self, job_id: str) -> None:
        """It came to its claim, won or lost."""
        self._failures.pop(job_id, None)
        self._until.pop(job_id, None)
