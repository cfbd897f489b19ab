"""Two projects, two keys: nothing of one is seen, named or changed by the other, on any route of the contract.

The routes come from the OpenAPI document, so a new one is crawled too; what it needs to be asked is said in two tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from openai import OpenAI
from sqlalchemy import select, update

from app.core.settings import Settings
from app.db.engine import Database
from app.db.tables import Base, Event, Job
from app.jobs import events
from app.rollouts.traces import append_trace
from app.web.main import create_app
from tests.api.jobs_fixture import install_model, upload
from tests.api.live_server import LiveServer
from tests.db.rows import METHOD, Seed

ABSENT = "file-0000000000000000"


@dataclass(frozen=True)
class Route:
    method: str
    path: str  # as in the document, with its {parameters}
    takes_body: bool


@pytest.fixture
def routes(live_server: LiveServer) -> list[Route]:
    paths = create_app(live_server.settings).openapi()["paths"]
    found = [
        Route(method.upper(), path, "requestBody" in operation)
        for path, item in paths.items()
        for method, operation in item.items()
    ]
    assert len(found) >= 19
    return found


@pytest.fixture
async def ours(client: OpenAI, database: Database, settings: Settings, tuned: str) -> dict[str, str]:
    """One of everything in our project: the value of each path parameter that stands for a row."""
    install_model(settings)
    seed = Seed(database, settings)
    file_id = upload(client).train
    job_id = await seed.job(model="bytes", training_file=file_id)
    trace = "ours/step-1.jsonl.zst"
    offset, length = append_trace(settings.traces_dir / trace, {"messages": []})
    rollout_id = await seed.rollout(job_id, trace_file=trace, trace_offset=offset, trace_length=length)
    await seed.checkpoint(job_id, 1)
    async with database.begin() as session:
        await session.execute(update(Job).where(Job.fine_tuned_model == tuned).values(method=METHOD))
        await events.append(session, project_id="proj_default", job_id=job_id, message="ours alone")
    return {"file_id": file_id, "job_id": job_id, "rollout_id": rollout_id, "model": tuned}


def body_naming(path: str, ours: dict[str, str], *, absent: bool = False) -> Any:
    """The smallest right body of a route, with one of our ids wherever it can hold one."""
    model = "ft:bytes:org-hone::absent" if absent else ours["model"]
    file_id = ABSENT if absent else ours["file_id"]
    bodies = {
        "/v1/fine_tuning/jobs": {
            "model": "tiny", "training_file": file_id, "validation_file": file_id, "method": METHOD,
        },
        "/v1/chat/completions": {"model": model, "messages": [{"role": "user", "content": "?"}]},
        "/v1/responses": {"model": model, "input": "?"},
    }  # fmt: skip
    assert path in bodies, f"{path} takes a body: say which, and where it can name a row"
    return bodies[path]


def filled(path: str, ours: dict[str, str]) -> str:
    given = {**ours, "response_id": "resp_1"}
    try:
        return path.format_map(given)
    except KeyError as missing:
        raise AssertionError(f"{path}: make a row of ours for {missing}") from None


@pytest.fixture
def stranger(live_server: LiveServer, other_key: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live_server.url, headers={"authorization": f"Bearer {other_key}"}, timeout=30) as made:
        yield made


async def dump(database: Database) -> dict[str, list[Any]]:
    async with database.read() as session:
        tables = [table for name, table in Base.metadata.tables.items() if name not in ("api_keys", "workers")]
        return {table.name: sorted(map(str, await session.execute(select(table)))) for table in tables}


async def test_every_route_that_takes_an_id_is_a_404_for_a_stranger(
    routes: list[Route], ours: dict[str, str], stranger: httpx.Client, http: httpx.Client, database: Database
) -> None:
    before = await dump(database)
    asked = [(route, filled(route.path, ours)) for route in routes if "{" in route.path]
    for route, path in asked:
        body = body_naming(route.path, ours) if route.takes_body else None
        answer = stranger.request(route.method, path, json=body)
        assert answer.status_code == 404, (route, answer.text)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert await dump(database) == before
    for route, path in sorted(asked, key=lambda pair: pair[0].method == "DELETE"):
        if "response_id" not in route.path:  # nobody's: responses are not stored
            body = body_naming(route.path, ours) if route.takes_body else None
            assert http.request(route.method, path, json=body).status_code != 404, route


async def test_lists_show_a_stranger_nothing_of_ours(
    routes: list[Route], ours: dict[str, str], stranger: httpx.Client, http: httpx.Client
) -> None:
    lists = [route.path for route in routes if route.method == "GET" and "{" not in route.path]
    assert len(lists) >= 3
    for path in lists:
        assert any(value in http.get(path).text for value in ours.values()), path
        answer = stranger.get(path)
        assert answer.status_code == 200, path
        assert not any(value in answer.text for value in ours.values()), path


async def test_an_id_of_ours_in_a_body_is_refused_like_one_that_does_not_exist(
    routes: list[Route], ours: dict[str, str], stranger: httpx.Client, database: Database
) -> None:
    for route in routes:
        if not route.takes_body or route.path == "/v1/files":  # an upload names nothing
            continue
        path = filled(route.path, ours)
        named = stranger.request(route.method, path, json=body_naming(route.path, ours))
        absent = stranger.request(route.method, path, json=body_naming(route.path, ours, absent=True))
        assert named.status_code == absent.status_code, route
        assert 400 <= named.status_code < 500, route
        assert named.text.replace(ours["file_id"], "X").replace(ours["model"], "X") == absent.text.replace(
            ABSENT, "X"
        ).replace("ft:bytes:org-hone::absent", "X")


async def test_a_page_after_an_id_of_ours_is_refused_like_one_after_no_id(
    routes: list[Route], ours: dict[str, str], stranger: httpx.Client
) -> None:
    for path, cursor in (("/v1/files", ours["file_id"]), ("/v1/fine_tuning/jobs", ours["job_id"])):
        answers = [stranger.get(path, params={"after": after}) for after in (cursor, "absent")]
        assert answers[0].status_code == answers[1].status_code
        assert answers[0].text.replace(cursor, "X") == answers[1].text.replace("absent", "X")


async def test_rows_carry_the_project_of_their_key(
    stranger: httpx.Client, database: Database, settings: Settings
) -> None:
    install_model(settings)
    rows = b'{"messages": [{"role": "user", "content": "1"}], "answer": "1"}\n' * 12
    given = {"files": {"file": ("a.jsonl", rows)}, "data": {"purpose": "fine-tune"}}
    train, valid = (stranger.post("/v1/files", **given).json()["id"] for _ in range(2))  # type: ignore[arg-type]
    body = {"model": "tiny", "training_file": train, "validation_file": valid, "method": METHOD}
    made = stranger.post("/v1/fine_tuning/jobs", json=body)
    assert made.status_code == 200, made.text
    async with database.read() as session:
        found = await session.scalars(select(Event.project_id).where(Event.job_id == made.json()["id"]))
        assert set(found) == {"proj_other"}
    assert stranger.get(f"/v1/fine_tuning/jobs/{made.json()['id']}").status_code == 200
