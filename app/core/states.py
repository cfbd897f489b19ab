"""The two closed vocabularies of the service: a job's status and a rollout's state.

Does not cover: which job transition is legal and for whom (`app.jobs.state`).
"""

from __future__ import annotations

from enum import StrEnum


class JobStatus(StrEnum):
    VALIDATING = "validating_files"  # the files are being read; nothing has been spent
    QUEUED = "queued"  # waits for a worker; the doorbell may be rung again at any time
    RUNNING = "running"  # one worker holds the lease
    PAUSED = "paused"  # off its worker; goes on from its last finished step
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})


class RolloutState(StrEnum):
    STARTED = "started"  # open: running, or graded and waiting for its group or its optimizer step
    TRAINED = "trained"  # in a batch whose optimizer step was taken
    EVALUATED = "evaluated"  # a validation rollout with a grade
    NO_SIGNAL = "no_signal"  # every sibling had the same reward: nothing to learn
    NOT_SELECTED = "not_selected"  # graded, but surplus or left out of the batch
    GROUP_DROPPED = "group_dropped"  # graded, but too few siblings survived
    STALE = "stale"  # its group's deadline passed
    TOOL_FAILED = "tool_failed"  # the user's tool could not be reached or answered 5xx to the end
    GRADER_FAILED = "grader_failed"  # the user's grader could not be reached or answered 5xx to the end
    SAMPLER_FAILED = "sampler_failed"  # no healthy sampler within the rollout's deadline
    INVALID_SCORE = "invalid_score"  # the grader answered something that is not a finite number
    CANCELLED = "cancelled"  # the job was cancelled, paused or stopped while it ran
    LOST = "lost"  # open when its worker died
    ROLLED_BACK = "rolled_back"  # finished above the step that a resume starts from


INFRASTRUCTURE = frozenset(
    {
        RolloutState.TOOL_FAILED,
        RolloutState.GRADER_FAILED,
        RolloutState.SAMPLER_FAILED,
        RolloutState.INVALID_SCORE,
    }
)  # never a reward, always a reason
