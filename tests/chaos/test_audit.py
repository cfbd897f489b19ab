"""The log inside the database sees each write that it is there to see, on both databases, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Engine, insert, text, update

from app.db import engine as databases
from app.db import migrate
from app.db.tables import Checkpoint, Event, Job, Rollout, Snapshot
from tests.chaos import audit
from tests.chaos.audit import Identity
from tests.postgres import NoPostgres, server

COMMON = {"project_id": "p", "job_id": "j", "created_at": 0.0}


@dataclass
class Audited:
    """A job that attempt 2 runs, under a lease that is alive."""

    engine: Engine
    me: Identity

    def job(self, **values: object) -> None:
        self._run(update(Job).where(Job.id == "j").values(**values))

    def add(self, table: type, **values: object) -> None:
        self._run(insert(table).values(**values))

    def _run(self, statement: object) -> None:
        with self.engine.begin() as connection:
            connection.execute(statement)  # type: ignore[call-overload]

    def seen(self) -> set[tuple[str, str]]:
        with self.engine.begin() as connection:
            rows = connection.execute(text(f"SELECT kind, table_name FROM {audit.LOG}"))
            return {(kind, table) for kind, table in rows if kind in audit.FORBIDDEN}


@pytest.fixture(params=["sqlite", "postgresql"])
def audited(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Audited]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'hone.db'}"
        migrate.upgrade(url)
        yield from _on(url)
        return
    try:
        with server() as postgres:
            url = postgres.create_database()
            yield from _on(url)
            postgres.drop_database(url)
    except NoPostgres as reason:
        pytest.skip(str(reason))


def _on(url: str) -> Iterator[Audited]:
    engine, me = databases.create_sync(url), Identity()
    me.show_on(engine)  # before the first connection
    audit.install(engine)
    made = Audited(engine, me)
    empty: dict[str, object] = {"method": {}, "options": {}, "result_files": [], "seconds": {}}
    counts = {"crashes": 0, "reserved_slots": 0, "step": 0, "trained_tokens": 0, "seed": 1}
    names = {"id": "j", "project_id": "p", "model": "m", "training_file": "f", "created_at": 0.0}
    running = {"status": "running", "attempt": 2, "lease_owner": "here:1", "lease_until": databases.now() + 60}
    made.add(Job, **empty, **counts, **names, **running)
    yield made
    engine.dispose()


def checkpoint(attempt: int) -> dict[str, object]:
    named = {"id": f"c{attempt}", "name": f"n{attempt}", "base_model": "m", "path": "x", "sha256": "y", "metrics": {}}
    return {**COMMON, **named, "step": attempt, "attempt": attempt}


def test_the_owner_may_write_and_end_its_job(audited: Audited) -> None:
    audited.me.attempt = 2
    audited.job(step=1)
    audited.add(Checkpoint, **checkpoint(2))
    audited.job(status="succeeded", lease_owner=None, lease_until=None)

    assert audited.seen() == set()


def test_an_attempt_that_was_succeeded_is_seen_wherever_it_writes(audited: Audited) -> None:
    audited.me.attempt = 1
    audited.job(step=1)
    audited.add(Checkpoint, **checkpoint(1))
    audited.add(Snapshot, **COMMON, step=1, attempt=1, path="x", sha256="y", cursor={})
    audited.add(Event, **COMMON, id="e", level="info", type="message", message="hello")
    key = {"id": "r", "attempt": 1, "step": 1, "split": "train", "row": 0, "group": 0, "sample": 0, "version": 0}
    counts = {"greedy": False, "truncated": False, "turns": 0, "tool_calls": 0, "invalid_calls": 0}
    tokens = {"completion_tokens": 0, "prompt_tokens": 0, "state": "started", "started_at": 0.0}
    audited.add(Rollout, project_id="p", job_id="j", **key, **counts, **tokens)

    tables = {"jobs", "checkpoints", "snapshots", "events", "rollouts"}
    assert audited.seen() == {(audit.STALE, table) for table in tables}


def test_a_write_to_a_job_that_was_given_back_is_stale(audited: Audited) -> None:
    audited.job(status="queued", lease_owner=None, lease_until=0.0)
    audited.me.attempt = 2
    audited.job(activity="still here")

    assert (audit.STALE, "jobs") in audited.seen()


def test_a_job_may_be_taken_from_the_dead_but_not_from_the_living(audited: Audited) -> None:
    audited.job(lease_until=0.0)
    audited.job(status="queued", lease_owner=None, lease_until=None)
    assert audited.seen() == set()

    audited.job(status="running", attempt=3, lease_until=databases.now() + 60)
    audited.job(attempt=4)
    assert audited.seen() == {(audit.STOLEN, "jobs")}


def test_a_client_may_cancel_under_a_live_lease_and_nobody_reopens_the_job(audited: Audited) -> None:
    audited.job(status="cancelled", attempt=3, lease_owner=None, lease_until=None)
    assert audited.seen() == set()

    audited.job(status="queued", attempt=2)
    assert audited.seen() == {(audit.REOPENED, "jobs"), (audit.BACKWARDS, "jobs")}


def test_a_registered_checkpoint_is_never_written_again(audited: Audited) -> None:
    audited.me.attempt = 2
    audited.add(Checkpoint, **checkpoint(2))
    with audited.engine.begin() as connection:
        connection.execute(update(Checkpoint).values(sha256="z"))

    assert audited.seen() == {(audit.REWRITTEN, "checkpoints")}
