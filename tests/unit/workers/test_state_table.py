"""Who may move a job: every pair of statuses and every actor."""

from __future__ import annotations

import itertools

import pytest

from app.core.states import INFRASTRUCTURE, TERMINAL, JobStatus, RolloutState
from app.jobs.state import TRANSITIONS, Actor, IllegalTransition, allowed, check

# As the design says it, in the words of the statuses; written out once more so that a slip in the table is seen.
LEGAL = {
    "validating_files": {"queued": "validator", "failed": "validator", "cancelled": "client"},
    "queued": {"running": "worker", "paused": "client", "cancelled": "client"},
    "running": {
        "queued": "worker reconciler",
        "paused": "client worker",
        "succeeded": "worker",
        "failed": "worker reconciler",
        "cancelled": "client",
    },
    "paused": {"queued": "client", "cancelled": "client"},
}


@pytest.mark.parametrize(("current", "target", "actor"), list(itertools.product(JobStatus, JobStatus, Actor)), ids=str)
def test_every_pair_for_every_actor(current: JobStatus, target: JobStatus, actor: Actor) -> None:
    if actor in LEGAL.get(current, {}).get(target, "").split():
        check(current, target, actor)
    else:
        with pytest.raises(IllegalTransition, match=f"{actor} may not move a job from {current} to {target}"):
            check(current, target, actor)


def test_nothing_leaves_a_terminal_status_and_every_other_can_be_cancelled() -> None:
    assert not {source for source, _ in TRANSITIONS} & TERMINAL
    assert {s for s in JobStatus if allowed(s, JobStatus.CANCELLED, Actor.CLIENT)} == set(JobStatus) - TERMINAL


def test_infrastructure_faults_are_never_a_reward() -> None:
    assert {str(state) for state in INFRASTRUCTURE} == {
        "tool_failed",
        "grader_failed",
        "sampler_failed",
        "invalid_score",
    }
    assert RolloutState.TRAINED not in INFRASTRUCTURE
