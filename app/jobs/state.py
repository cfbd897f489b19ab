"""Who may move a job from which status to which: one table, applied by `leases` (workers) and `service` (the API) only.

Does not cover: what happens to the running process — see `workers.supervisor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from app.core.states import JobStatus

S = JobStatus


class Actor(StrEnum):
    CLIENT = "client"  # an API call
    VALIDATOR = "validator"  # the runner reading the files
    WORKER = "worker"  # the supervisor that holds the lease
    RECONCILER = "reconciler"  # the loop that takes back expired leases


# A pair that is not here is a 400 for a client and a bug for a worker.
TRANSITIONS: Mapping[tuple[JobStatus, JobStatus], frozenset[Actor]] = {
    (S.VALIDATING, S.QUEUED): frozenset({Actor.VALIDATOR}),
    (S.VALIDATING, S.FAILED): frozenset({Actor.VALIDATOR}),
    (S.VALIDATING, S.CANCELLED): frozenset({Actor.CLIENT}),
    (S.QUEUED, S.RUNNING): frozenset({Actor.WORKER}),
    (S.QUEUED, S.PAUSED): frozenset({Actor.CLIENT}),
    (S.QUEUED, S.CANCELLED): frozenset({Actor.CLIENT}),
    (S.RUNNING, S.QUEUED): frozenset({Actor.WORKER, Actor.RECONCILER}),
    (S.RUNNING, S.PAUSED): frozenset({Actor.CLIENT, Actor.WORKER}),
    (S.RUNNING, S.SUCCEEDED): frozenset({Actor.WORKER}),
    (S.RUNNING, S.FAILED): frozenset({Actor.WORKER, Actor.RECONCILER}),
    (S.RUNNING, S.CANCELLED): frozenset({Actor.CLIENT}),
    (S.PAUSED, S.QUEUED): frozenset({Actor.CLIENT}),
    (S.PAUSED, S.CANCELLED): frozenset({Actor.CLIENT}),
}


class IllegalTransition(Exception):
    """The pair is not in the table, or not for this actor."""


def check(current: JobStatus, target: JobStatus, actor: Actor) -> None:
    """Raises `IllegalTransition` unless `actor` may move a job from `current` to `target`."""
    if not allowed(current, target, actor):
        raise IllegalTransition(f"{actor} may not move a job from {current} to {target}")


def allowed(current: JobStatus, target: JobStatus, actor: Actor) -> bool:
    return actor in TRANSITIONS.get((current, target), frozenset())
