"""Who is let in: a key of ours that was not revoked, on every route under /v1."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import httpx
import openai
import pytest
from openai import OpenAI
from sqlalchemy import select

from app.db.engine import Database
from app.db.tables import ApiKey
from app.security.api_keys import KeyRing, load_peppers, new_key
from app.web.main import create_app
from tests.api.live_server import LiveServer


@pytest.fixture
def anonymous(live_server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live_server.url, timeout=30) as made:
        yield made


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Basic abc", "Bearer sk-hone-wrong", "Bearer " + "x" * 5000, "Bearer \xe9"],
)
def test_without_a_key_of_ours_every_call_is_a_401(anonymous: httpx.Client, header: str | None) -> None:
    headers = {} if header is None else {b"authorization": header.encode("latin-1")}
    response = anonymous.get("/v1/models", headers=headers)  # type: ignore[arg-type]
    assert response.status_code == 401
    error = response.json()["error"]
    assert (error["code"], error["type"], error["param"]) == ("invalid_api_key", "invalid_request_error", None)


def test_a_well_formed_key_that_was_never_made_is_refused(live_server: LiveServer) -> None:
    with OpenAI(base_url=live_server.base_url, api_key=new_key(), max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as caught:
            stranger.models.list()
        assert stranger.api_key not in caught.value.message


def test_every_route_under_v1_needs_a_key(live_server: LiveServer, anonymous: httpx.Client) -> None:
    app = create_app(live_server.settings)
    calls = [(method, path) for path, item in app.openapi()["paths"].items() for method in item]
    assert len(calls) >= 7
    for method, path in calls:
        response = anonymous.request(method, path.replace("{", "").replace("}", ""), json={})
        assert response.status_code == 401, (method, path)


async def test_a_revoked_key_stops_working_at_once(live_server: LiveServer, client: OpenAI, database: Database) -> None:
    client.models.list()
    ring = KeyRing(load_peppers(live_server.settings))
    async with database.begin() as session:
        [key] = await ring.list(session)
        await ring.revoke(session, key.id)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


async def test_the_key_is_nowhere_in_database_or_log(
    live_server: LiveServer, client: OpenAI, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="app")
    client.models.list()
    async with database.read() as session:
        [row] = (await session.scalars(select(ApiKey))).all()
    secret = live_server.api_key[len("sk-hone-") : -4]
    assert all(secret not in str(value) for value in vars(row).values())
    assert secret not in caplog.text
    for path in live_server.settings.root.glob("hone.db*"):
        assert secret.encode() not in path.read_bytes()


def test_health_needs_no_key(anonymous: httpx.Client) -> None:
    assert anonymous.get("/livez").status_code == 200
    assert anonymous.get("/healthz").status_code == 503
