"""Sealed values move to a new key in batches, on either database.

Does not cover: the key file (`tests/unit/security`).
"""

from __future__ import annotations

from sqlalchemy import select

from app.db.engine import Database
from app.db.tables import Job
from app.jobs.headers import open_headers, seal_headers
from app.security.rotation import BATCH, reseal
from app.security.vault import Vault
from tests.db.rows import METHOD, Seed

OLD, NEW = "o" * 32, "n" * 32
TOOL = {"name": "t", "server_url": "http://127.0.0.1:9/t", "headers": {"X-Key": "canary"}}


async def test_every_row_opens_with_the_new_key_alone(database: Database, seed: Seed) -> None:
    method = {"type": "reinforcement", "reinforcement": {**METHOD["reinforcement"], "tools": [TOOL]}}
    for number in range(BATCH + 1):
        job_id = f"ftjob-{number:03}"
        await seed.job(id=job_id, method=seal_headers(method, Vault([OLD]), job_id))
    assert (await reseal(database, Vault([NEW, OLD]))).rows == BATCH + 1
    async with database.read() as session:
        jobs = (await session.scalars(select(Job))).all()
    assert [open_headers(job.method, Vault([NEW]), job.id) for job in jobs] == [method] * (BATCH + 1)
    assert (await reseal(database, Vault([NEW, OLD]))).rows == 0
