"""Stands for `workers.supervisor` behind a door: claims as it does, notes that in a file, holds the job, ends it.

Does not cover: leash and trainer. Arguments: what to note in, seconds to hold, job, and those of the leash.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from app.core.settings import Settings
from app.core.states import JobStatus
from app.db.engine import Database
from app.jobs import leases


async def main(notes: Path, seconds: float, job_id: str) -> None:
    settings = Settings()
    database = Database(settings.database)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    owner = leases.owner_name(settings.hostname, os.getpid())
    async with database.begin() as session:
        claim = await leases.claim(session, job_id, owner=owner, lease_s=60, adapter_slots=8)
    with notes.open("a") as file:
        file.write(f"{job_id} {'claimed' if claim else 'refused'} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
    if claim is not None:
        try:
            await asyncio.wait_for(stop.wait(), seconds)
        except TimeoutError:
            async with database.begin() as session:
                await leases.finish(session, claim.fence, JobStatus.SUCCEEDED)
        else:
            async with database.begin() as session:
                await leases.release(session, claim.fence, reason="asked to stop")
    await database.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]))
