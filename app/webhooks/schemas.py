"""The events that leave the service: their types, and the bytes of one.

Does not cover: when an event is written (`outbox`), nor the headers it travels with (`signing`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from app.core.states import JobStatus

PREFIX = "fine_tuning.job."
# OpenAI's three, and one of ours: a paused job waits for a person.
EVENT_OF: Mapping[JobStatus, str] = {
    JobStatus.SUCCEEDED: f"{PREFIX}succeeded",
    JobStatus.FAILED: f"{PREFIX}failed",
    JobStatus.CANCELLED: f"{PREFIX}cancelled",
    JobStatus.PAUSED: f"{PREFIX}paused",
}
EVENT_TYPES = tuple(EVENT_OF.values())


def body(*, event_id: str, type: str, created_at: float, job_id: str) -> bytes:
    """What is signed and sent; every attempt of a delivery sends the same bytes."""
    event = {
        "id": event_id,
        "object": "event",
        "created_at": int(created_at),
        "type": type,
        "data": {"id": job_id},
    }
    return json.dumps(event, separators=(",", ":")).encode()
