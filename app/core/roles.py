"""What a key may do.

Does not cover: which request needs which role (`app.web.deps`).
"""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """Each role may do what those before it may."""

    READ = "read"  # look: jobs, events, rollouts, files, models
    RUN = "run"  # also spend and change: create, cancel, upload, delete, chat
    ADMIN = "admin"  # also administer; the HTTP API has nothing that needs it yet

    def covers(self, needed: Role) -> bool:
        order = list(Role)
        return order.index(self) >= order.index(needed)
