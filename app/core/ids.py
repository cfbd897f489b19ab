"""Ids as clients know them: a prefix and 24 random characters; trace ids are UUIDs (contract §7.3).

Does not cover: model names, which are built from a job (`app.checkpoints.names`).
"""

from __future__ import annotations

import secrets
import string
import uuid

_ALPHABET = string.ascii_letters + string.digits


def new_id(prefix: str) -> str:
    """`new_id("ftjob-")` → `ftjob-` and 24 characters, about 143 bits."""
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(24))


def new_trace_id() -> str:
    """The id of one rollout: sent to every tool and to the grader, and the key of the stored trace."""
    return f"trace_{uuid.uuid4()}"
