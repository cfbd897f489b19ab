from __future__ import annotations

import time

import httpx
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from app.db.engine import Database
from app.db.tables import Event, Job, Rollout, Sampler, Worker

COMMON = {"project_id": "proj_secret"}


def scrape(http: httpx.Client) -> dict[tuple[str, tuple[str, ...]], float]:
    """Every sample by name and label values; what cannot be parsed raises."""
    answer = http.get("/metrics")
    assert answer.status_code == 200
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def job(id: str, status: str, created_at: float = 1.0, **values: object) -> Job:
    needed = {"model": "m", "training_file": "file-1", "seed": 1, "method": {}, "options": {}}
    return Job(id=id, status=status, created_at=created_at, **COMMON, **needed, **values)


async def rollout(database: Database, job_id: str, number: int, state: str) -> None:
    done = None if state == "started" else 2.0
    async with database.begin() as session:
        session.add(
            Rollout(
                id=f"{job_id}-{number}", job_id=job_id, attempt=1, step=1, split="train", row=0, group=0, sample=number,
                version=0, state=state, started_at=1.0, finished_at=done, **COMMON,
            )
        )  # fmt: skip


def test_requests_are_counted_by_route_template_and_status(http: httpx.Client) -> None:
    http.get("/v1/files/file-one")
    http.get("/v1/files/file-two")
    http.get("/v1/no-such-thing")
    http.request("BREW", "/v1/files")
    found = scrape(http)
    assert found["hone_http_requests_total", ("GET", "/v1/files/{file_id}", "404")] == 2
    assert found["hone_http_requests_total", ("GET", "none", "404")] == 1
    assert found["hone_http_request_duration_seconds_count", ("GET", "/v1/files/{file_id}")] == 2
    assert not any("BREW" in labels or any("file-one" in label for label in labels) for _, labels in found)


async def test_jobs_and_their_rollouts_are_counted(http: httpx.Client, database: Database) -> None:
    async with database.begin() as session:
        session.add(job("a", "running", lease_until=time.time() + 60, seconds={"sampling": 2.0, "tools": 1.0}))
        session.add(job("b", "running", lease_until=1.0, seconds={"sampling": 3.0}))
        session.add(job("c", "succeeded", seconds={"sampling": 100.0}))
    for number, (of, state) in enumerate([("a", "started"), ("a", "trained"), ("b", "trained"), ("c", "trained")]):
        await rollout(database, of, number, state)
    found = scrape(http)
    assert found["hone_jobs", ("running",)] == 2
    assert found["hone_jobs", ("failed",)] == 0
    assert found["hone_rollouts", ("trained",)] == 2
    assert found["hone_rollouts", ("started",)] == 1
    assert found["hone_phase_seconds", ("sampling",)] == 5
    assert found["hone_leases_expired", ()] == 1


async def test_a_job_that_was_put_back_waits_since_then(http: httpx.Client, database: Database) -> None:
    assert scrape(http)["hone_queue_age_seconds", ()] == 0
    async with database.begin() as session:
        session.add(job("a", "queued", created_at=time.time() - 5000))
        await session.flush()
        for number, age in enumerate((4000, 100)):
            session.add(
                Event(
                    id=f"e{number}", job_id="a", created_at=time.time() - age, level="info", type="message",
                    message="", **COMMON,
                )
            )  # fmt: skip
    assert 99 < scrape(http)["hone_queue_age_seconds", ()] < 200


async def test_only_what_still_beats_is_alive(http: httpx.Client, database: Database) -> None:
    for name, age in (("new", 0.0), ("old", 3600.0)):
        then = time.time() - age
        async with database.begin() as session:
            numbers = {"pid": 1, "process_group": 1, "process_started": 0, "started_at": then, "heartbeat": then}
            session.add(Worker(id=name, kind="runner", host=name, place="", **numbers, **COMMON))
            session.add(
                Sampler(
                    id=name, base_model="bytes", url=name, host=name, adapter_root="/", max_loras=4, info={},
                    started_at=then, heartbeat=then, **COMMON,
                )
            )  # fmt: skip
    found = scrape(http)
    assert found["hone_samplers", ("bytes",)] == 1
    assert found["hone_processes", ("runner",)] == 1


async def test_no_project_and_no_job_is_named(http: httpx.Client, database: Database) -> None:
    async with database.begin() as session:
        session.add(job("ftjob-secret", "queued"))
    assert "secret" not in http.get("/metrics").text


async def test_a_database_that_fails_is_a_figure_and_no_failed_scrape(http: httpx.Client, database: Database) -> None:
    assert scrape(http)["hone_database_up", ()] == 1
    async with database.begin() as session:
        await session.execute(text("ALTER TABLE jobs RENAME TO jobs_away"))
    found = scrape(http)
    assert found["hone_database_up", ()] == 0
    assert ("hone_jobs", ("queued",)) not in found
    assert found["hone_http_requests_total", ("GET", "/metrics", "200")] == 1
