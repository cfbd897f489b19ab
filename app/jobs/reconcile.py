"""One pass over what the dead left behind: expired leases back to the queue, within a crash budget.

Does not cover: ringing workers, which the production set-up adds to the same loop; sending webhooks (`app.webhooks`).
"""

from __future__ import annotations

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.states import JobStatus
from app.db.engine import now, rows_changed
from app.db.tables import Job
from app.jobs import events, leases, state
from app.webhooks import outbox


async def take_back_expired(session: AsyncSession, max_crashes: int) -> list[str]:
    """running with an expired lease → queued, or failed when `max_crashes` came without a finished step in between.

    Returns the ids that were queued again. Any number of copies may run: the UPDATE names the attempt it saw.
    """
    query = (
        select(Job).where(Job.status == JobStatus.RUNNING, Job.lease_until <= now()).with_for_update(skip_locked=True)
    )
    again: list[str] = []
    for job in (await session.scalars(query)).all():
        crashes = job.crashes + 1
        target = JobStatus.QUEUED if crashes < max_crashes else JobStatus.FAILED
        state.check(JobStatus.RUNNING, target, state.Actor.RECONCILER)
        error = None
        if target is JobStatus.FAILED:
            error = {
                "code": "worker_lost",
                "message": f"The worker died {crashes} times without finishing a step; see logs/ in the data directory",
                "param": None,
            }
        result = await rows_changed(
            session,
            update(Job)
            .where(Job.id == job.id, Job.attempt == job.attempt, Job.status == JobStatus.RUNNING)
            .values(
                status=target,
                crashes=crashes,
                error=error,
                finished_at=None if error is None else now(),
                **leases.given_up(),
            ),
        )
        if result != 1:
            continue
        if error is not None:
            await leases.close_open_rollouts(session, job.id)
            await events.append(
                session, project_id=job.project_id, job_id=job.id, level="error", message=str(error["message"])
            )
            await outbox.enqueue(session, job.id, target)
        else:
            again.append(job.id)
            await events.append(
                session,
                project_id=job.project_id,
                job_id=job.id,
                level="warn",
                message=f"The worker of attempt {job.attempt} is silent; the job goes on from its last snapshot",
            )
    return again
