"""The embedded runner: the janitor's duties, and one supervisor process per job, found by polling.

Does not cover: running a job (`workers.supervisor`). The production set-up replaces this door by a Celery task; both
lead to the same room (`workers.doors`), because the supervisor itself wins or loses the claim.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from app.core.settings import Settings
from app.jobs import leases
from workers.daemon import main
from workers.doors import GRACE_S, bury, has_room, not_started, start_supervisor
from workers.janitor import Housekeeping
from workers.process import Child
from workers.starts import Starts


class Runner(Housekeeping):
    """One per host. `runner_slots` supervisors at once."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.children: dict[str, Child] = {}
        self.starts = Starts()

    async def tick(self) -> None:
        for job_id, child in list(self.children.items()):
            if child.poll() is not None:
                del self.children[job_id]
                await bury(self.database, self.settings, job_id, child, self.starts)
        await super().tick()

    async def attend(self, waiting: Sequence[leases.Waiting]) -> None:
        full: set[str] = set()  # models without room: nobody overtakes a job that waits for it
        for job in waiting:
            if len(self.children) == self.settings.runner_slots:
                return
            if job.id in self.children or job.model in full or not self.starts.may_start(job.id):
                continue
            if await has_room(self.database, self.settings, job.id):
                try:
                    self.children[job.id] = self.start(job.id)
                except OSError as error:  # its log cannot be written, say: jobs that run go on
                    await not_started(self.database, self.settings, job.id, self.starts, error)
            else:
                full.add(job.model)

    def start(self, job_id: str) -> Child:
        return start_supervisor(self.settings, job_id, environment={})

    async def shut_down(self) -> None:
        for child in self.children.values():
            child.terminate()
        await asyncio.gather(*(asyncio.to_thread(child.stop, GRACE_S) for child in self.children.values()))
        await super().shut_down()


if __name__ == "__main__":
    main("workers.local", Runner)
