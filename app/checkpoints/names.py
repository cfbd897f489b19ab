"""Model names as clients see them: `ft:<base>:<org>:<suffix>:<id>`, and `…:ckpt-step-N` for a checkpoint (§9.1).

Does not cover: adapter names inside a sampler, which carry attempt and version (`workers.sampler.policy`).
"""

from __future__ import annotations


def fine_tuned(base_model: str, organization: str, suffix: str | None, job_id: str) -> str:
    """The final model's name; unique because it ends in the job's own id."""
    return f"ft:{base_model}:{organization.removeprefix('org-')}:{suffix or ''}:{job_id.removeprefix('ftjob-')[:8]}"


def at_step(final: str, step: int) -> str:
    return f"{final}:ckpt-step-{step}"
