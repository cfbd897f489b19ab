"""Who is let in: a key of ours that was not revoked, on every route under /v1."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import httpx
import openai
import pytest
from openai import OpenAI
from sqlalchemy import select

from app.core.roles import Role
from app.db.engine import Database
from app.db.tables import ApiKey
from app.security.api_keys import Caller, KeyRing, load_peppers, new_key
from app.web.main import build_services, create_app
from app.web.middleware import MAX_BODY_BYTES
from tests.api.live_server import LiveServer, create_key


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


@pytest.mark.parametrize("role", list(Role))
async def test_a_key_may_look_with_any_role_and_change_things_with_run(live_server: LiveServer, role: Role) -> None:
    key = await create_key(live_server.settings, role=role)
    paths = create_app(live_server.settings).openapi()["paths"]
    calls = [(method, path) for path, item in paths.items() for method in item]
    assert {method for method, _ in calls} >= {"get", "post", "delete"}
    with httpx.Client(base_url=live_server.url, headers={"authorization": f"Bearer {key}"}, timeout=30) as keyed:
        for method, path in calls:
            answer = keyed.request(method, path.replace("{", "").replace("}", ""), json={})
            refused = role is Role.READ and method != "get"
            assert (answer.status_code == 403) == refused, (method, path)
            if refused:
                error = answer.json()["error"]
                assert (error["code"], error["param"]) == ("insufficient_permissions", None)
                assert "it needs the role 'run'" in error["message"]
                assert key not in answer.text


async def test_the_official_client_sees_a_role_that_is_too_small(live_server: LiveServer) -> None:
    key = await create_key(live_server.settings, role=Role.READ)
    with OpenAI(base_url=live_server.base_url, api_key=key, max_retries=0) as reader:
        assert reader.files.list().data == []
        with pytest.raises(openai.PermissionDeniedError, match="needs the role 'run'"):
            reader.files.create(file=("a.jsonl", b"{}"), purpose="fine-tune")


async def test_a_key_moves_to_the_new_secret_by_its_next_use(
    live_server: LiveServer, client: OpenAI, database: Database
) -> None:
    [pepper], other = load_peppers(live_server.settings), b"n" * 32
    old, rotated, new = KeyRing([pepper]), KeyRing([other, pepper]), KeyRing([other])
    async with database.begin() as session:
        found = await rotated.find(session, live_server.api_key)
        assert found is not None
        assert found.stale
        assert await rotated.stale(session) == [found.key_id]
        assert await new.find(session, live_server.api_key) is None
        await rotated.renew(session, found.key_id, live_server.api_key)
    async with database.read() as session:
        assert await rotated.stale(session) == []
        assert await new.find(session, live_server.api_key) == Caller("proj_default", found.key_id, Role.RUN)
        assert await old.find(session, live_server.api_key) is None


async def test_a_stale_key_is_renewed_by_a_request(live_server: LiveServer, database: Database) -> None:
    old = KeyRing([b"o" * 32])
    peppers = [*load_peppers(live_server.settings), b"o" * 32]
    async with database.begin() as session:
        key = await old.create(session, "old")
    services = replace(build_services(live_server.settings), keys=KeyRing(peppers))
    app = create_app(live_server.settings)
    app.state.services = services
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as made:
        answer = await made.get("/v1/files", headers={"authorization": f"Bearer {key}"})
    await services.database.close()
    assert answer.status_code == 200
    async with database.read() as session:
        assert await KeyRing(peppers).stale(session) == []


def test_a_body_above_the_limit_is_a_413_on_every_route(live_server: LiveServer, http: httpx.Client) -> None:
    paths = create_app(live_server.settings).openapi()["paths"]
    calls = [(method, path) for path, item in paths.items() for method in item if method != "get"]
    assert len(calls) >= 6
    upload = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
    headers = {"content-type": "multipart/form-data; boundary=b"}
    for method, path in calls:
        body = upload + b"x" * MAX_BODY_BYTES  # above max_file_bytes of this server too
        answer = http.request(method, path.replace("{", "").replace("}", ""), content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error"), (method, path)


def test_health_needs_no_key(anonymous: httpx.Client) -> None:
    assert anonymous.get("/livez").status_code == 200
    assert anonymous.get("/healthz").status_code == 503
