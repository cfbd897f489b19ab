"""Ids as clients know them: a prefix and 24 random characters; trace ids are UUIDs (contract §7.3).

Does not cover: model names, which are built from a job (`app.checkpoints.names`).
"""

from __future__ import annotations

import secrets
import string
import uuid

_ALPHABET = string.ascii_letters + string.digits
_LENGTH = 24


def new_id(prefix: str) -> str:
    """`new_id("ftjob-")` → `ftjob-` and 24 characters, about 143 bits."""
    number, characters = secrets.randbelow(len(_ALPHABET) ** _LENGTH), []  # one draw: a tool call needs two ids
    for _ in range(_LENGTH):
        number, index = divmod(number, len(_ALPHABET))
        characters.append(_ALPHABET[index])
    return prefix + "".join(characters)


def new_trace_id() -> str:
    """The id of one rollout: sent to every tool and to the grader, and the key of the stored trace."""
    return f"trace_{uuid.uuid4()}"
