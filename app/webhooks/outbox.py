"""Write a job's new status into the outbox, in the transaction that changes it: both are there, or neither.

Does not cover: sending (`delivery`). Whoever writes `jobs.status` calls this after the write, so that the row's lock
puts the events of one job in the order of its changes.
"""

from __future__ import annotations

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.ids import new_id
from app.core.states import JobStatus
from app.db.engine import now
from app.db.tables import Job, WebhookDelivery, WebhookEndpoint
from app.webhooks.schemas import EVENT_OF


async def enqueue(session: AsyncSession, job_id: str, status: JobStatus) -> None:
    """One pending delivery for each endpoint of the job's project that wants this event; all carry the same id."""
    type_ = EVENT_OF.get(status)
    if type_ is None:
        return
    query = (
        select(WebhookEndpoint.id, WebhookEndpoint.events, WebhookEndpoint.project_id)
        .join(Job, Job.project_id == WebhookEndpoint.project_id)
        .where(Job.id == job_id, WebhookEndpoint.disabled_at.is_(None))
        # A removal waits for us: it must not make the insert, and with it the end of a job, break on a foreign key.
        .with_for_update(of=WebhookEndpoint, read=True, key_share=True)
    )
    event_id = new_id("evt_")
    for endpoint_id, wanted, project_id in (await session.execute(query)).all():
        if type_ in wanted:
            await session.execute(
                insert(WebhookDelivery).values(
                    event_id=event_id,
                    project_id=project_id,
                    endpoint_id=endpoint_id,
                    job_id=job_id,
                    type=type_,
                    created_at=now(),
                    state="pending",
                    attempts=0,
                    due_at=now(),
                )
            )
