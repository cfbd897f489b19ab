"""A create stays fast while a job writes to the same SQLite file. Does not cover: several API processes."""

from __future__ import annotations

import sqlite3
import threading
import time

from openai import OpenAI

from app.core.settings import Settings
from tests.api.jobs_fixture import install_model, upload

CREATES = 100


def busy_supervisor(settings: Settings, stop: threading.Event, batches: list[int]) -> None:
    """Ledger batches as a supervisor writes them, but twenty a second instead of one."""
    connection = sqlite3.connect(settings.root / "hone.db", timeout=10, isolation_level=None)
    connection.execute("PRAGMA synchronous=NORMAL")
    columns = 'project_id, job_id, attempt, step, split, greedy, row, "group", sample, version, state, truncated'
    counters = "turns, tool_calls, invalid_calls, completion_tokens, prompt_tokens, started_at"
    (job_id,) = connection.execute("SELECT id FROM jobs LIMIT 1").fetchone()
    while not stop.wait(0.05):
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(
            f"INSERT INTO rollouts (id, {columns}, {counters}) VALUES "
            "(?, 'p', ?, 1, 1, 'train', 0, 0, 0, 0, 0, 'started', 0, 0, 0, 0, 0, 0, 1.0)",
            [(f"trace-{len(batches)}-{number}", job_id) for number in range(64)],
        )
        connection.execute("COMMIT")
        batches.append(64)
    connection.close()


def test_create_answers_within_half_a_second_at_p99_while_a_job_writes(client: OpenAI, settings: Settings) -> None:
    install_model(settings)
    files = upload(client)
    client.fine_tuning.jobs.create(**files.body())
    stop, batches, seconds = threading.Event(), [0], []
    writer = threading.Thread(target=busy_supervisor, args=(settings, stop, batches))
    writer.start()
    try:
        for _ in range(CREATES):
            started = time.perf_counter()
            client.fine_tuning.jobs.create(**files.body())
            seconds.append(time.perf_counter() - started)
    finally:
        stop.set()
        writer.join()
    assert len(batches) > 5, "the writer did not write beside the creates"
    assert sorted(seconds)[CREATES - 2] < 0.5
