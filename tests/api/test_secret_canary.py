"""Secrets in tool and grader headers, and the API key: searched for in everything that a session left behind.

Does not cover: what a worker writes (`tests/e2e/test_secrets.py`).
"""

from __future__ import annotations

import base64
import json
import logging
import re
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from app.core.settings import Settings
from app.db.engine import Database
from app.db.tables import Job
from app.jobs.headers import open_headers
from app.security import rotation
from app.security.vault import load_vault
from app.webhooks import service as webhooks
from tests.api.jobs_fixture import MODEL, install_model
from tests.api.live_server import LiveServer
from tests.canary import found_in, left_in
from tests.db.rows import GRADER, dataset

TOOL, GRADE, NESTED, REFUSED = ("canary-tool-7d1e", "canary-grade-52af", "canary-nested-c0d4", "canary-refused-91bb")
CLIENTS = ("httpx", "httpcore", "urllib3")  # the test's own side of the wire


def method(**tool: Any) -> dict[str, Any]:
    endpoint = {"type": "endpoint", "name": "a", "url": "http://127.0.0.1:9/g", "headers": {"X-Key": GRADE}}
    inner = {**endpoint, "name": "b", "headers": {"Authorization": f"Bearer {NESTED}"}}
    grader = {"type": "multi", "name": "m", "graders": {"a": endpoint, "headers": inner}, "calculate_output": "a"}
    first = {"name": "t", "server_url": "http://127.0.0.1:9/t", "headers": {"Authorization": f"Bearer {TOOL}"}, **tool}
    return {"type": "reinforcement", "reinforcement": {"grader": grader, "tools": [first]}}


def session_of(http: httpx.Client) -> list[httpx.Response]:
    """A create that is accepted, looks at it from everywhere, and creates that are refused for many reasons."""
    given = {"purpose": "fine-tune"}
    uploads = [http.post("/v1/files", files={"file": ("a.jsonl", dataset(12, n))}, data=given) for n in (0, 99)]
    train, valid = (answer.json()["id"] for answer in uploads)
    body = {"model": MODEL, "training_file": train, "validation_file": valid, "method": method()}
    created = http.post("/v1/fine_tuning/jobs", json=body)
    assert created.status_code == 200, created.text
    one = f"/v1/fine_tuning/jobs/{created.json()['id']}"
    looked = [http.get(path) for path in ("/v1/fine_tuning/jobs", one, f"{one}/events", f"{one}/checkpoints")]
    changed = [http.post(f"{one}/{verb}") for verb in ("pause", "resume", "cancel", "cancel")]
    wrong: list[Any] = [
        {"headers": {"X-Key": f"{REFUSED}\n"}},
        {"headers": {"Host": REFUSED}},
        {"headers": {"X-Key": [REFUSED]}},
        {"headers": f"X-Key: {REFUSED}"},
        {"headers": {"X-Key": REFUSED * 999}},
        {"server_url": f"http://user:{REFUSED}@127.0.0.1/"},
        {"server_url": f"ftp://127.0.0.1/{REFUSED}"},
        {"server_url": {"url": REFUSED}},
        {"name": [REFUSED]},
    ]
    refused = [http.post("/v1/fine_tuning/jobs", json={**body, "method": method(**tool)}) for tool in wrong]
    torn = json.dumps(body)[:-1].replace(TOOL, REFUSED)
    refused.append(http.post("/v1/fine_tuning/jobs", content=torn))
    refused.append(http.post("/v1/fine_tuning/jobs", json={**body, "training_file": "file-absent"}))
    refused.append(http.post("/v1/chat/completions", content=torn))
    assert {answer.status_code for answer in refused} == {400}, [answer.text for answer in refused]
    return [*uploads, created, *looked, *changed, *refused]


async def test_no_secret_is_left_anywhere(
    live_server: LiveServer,
    http: httpx.Client,
    database: Database,
    settings: Settings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    install_model(settings)
    answers = session_of(http)
    vault = load_vault(None, settings.root)
    async with database.begin() as session:
        issued = await webhooks.add(session, vault, "proj_default", "http://127.0.0.1:9/hook")
    await rotation.rotate_key_file(database, settings.root, sleep=_at_once)
    secrets = [TOOL, GRADE, NESTED, REFUSED, live_server.api_key.removeprefix("sk-hone-")[:20]]
    secrets.append(issued.secret.removeprefix("whsec_"))
    said = {f"{n} {answer.url}": f"{answer.headers} {answer.text}" for n, answer in enumerate(answers)}
    logged = [record for record in caplog.records if not record.name.startswith(CLIENTS)]
    places = {**said, **left_in(settings.root), "log": "\n".join(f"{vars(r)} {r.getMessage()}" for r in logged)}
    assert not any(re.search(r"v1\.[0-9a-f]{8}\.", text) for text in said.values())  # nor in its sealed form
    assert any(record.name.startswith("aiosqlite") for record in logged)  # the loudest logger was heard
    assert {place: hits for place, text in places.items() if (hits := found_in(text, secrets))} == {}
    async with database.read() as session:
        [job] = (await session.scalars(select(Job))).all()
    opened = json.dumps(open_headers(job.method, vault, job.id))
    assert all(secret in opened for secret in (TOOL, GRADE, NESTED))


async def _at_once(_: float) -> None:
    """Nothing else writes."""


@pytest.mark.parametrize("text", [TOOL, f"Basic {base64.b64encode(b'user:' + TOOL.encode()).decode()}"])
def test_the_search_finds_a_secret(text: str) -> None:
    assert found_in(f"x {text} y", [TOOL])
    assert not found_in(json.dumps(GRADER), [TOOL])
