"""Files through the official client: upload, list, read, delete."""

from __future__ import annotations

import io
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from sqlalchemy import update
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.ids import new_id
from app.db.engine import Database
from app.db.tables import DEFAULT_PROJECT, File, Job
from tests.api.live_server import LiveServer

ROWS = b'{"messages": []}\n{"messages": [1]}\n'


def _stored(server: LiveServer) -> list[Path]:
    return [path for path in server.settings.files_dir.rglob("*") if path.is_file()]


def test_an_uploaded_file_comes_back_byte_for_byte(client: OpenAI) -> None:
    made = client.files.create(file=('../träin ".jsonl', ROWS), purpose="fine-tune")
    assert made.id.startswith("file-")
    assert (made.object, made.bytes, made.status, made.purpose) == ("file", len(ROWS), "processed", "fine-tune")
    assert made.filename.startswith("../tr")
    assert client.files.wait_for_processing(made.id).status == "processed"
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == ROWS


def test_upload_by_path_and_by_raw_bytes(client: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROWS)
    assert client.files.create(file=path, purpose="fine-tune").filename == "rows.jsonl"
    assert client.files.create(file=ROWS, purpose="user_data").filename == "upload"


def test_bad_rows_are_named_in_status_details(client: OpenAI) -> None:
    made = client.files.create(file=("x.jsonl", b'{"a": 1}\nnope\n[]\n'), purpose="fine-tune")
    assert made.status == "error"
    assert made.status_details is not None
    assert "line 2" in made.status_details
    assert "line 3" in made.status_details


def test_a_file_of_another_purpose_is_not_read_as_jsonl(client: OpenAI) -> None:
    assert client.files.create(file=("x.bin", b"\x00\xff"), purpose="user_data").status == "processed"


def test_lists_page_in_both_orders_and_by_purpose(client: OpenAI) -> None:
    ids = [client.files.create(file=(f"{n}.jsonl", ROWS), purpose="fine-tune").id for n in range(5)]
    client.files.create(file=("x", b"x"), purpose="user_data")
    assert [file.id for file in client.files.list(limit=2, order="asc", purpose="fine-tune")] == ids
    assert [file.id for file in client.files.list(limit=1, purpose="fine-tune")] == ids[::-1]
    page = client.files.list(limit=2, order="asc")
    assert (page.has_more, [file.id for file in page.data]) == (True, ids[:2])


@pytest.mark.parametrize(
    "query", [{"limit": 0}, {"limit": 10_001}, {"limit": "x"}, {"order": "up"}, {"after": "file-no"}]
)
def test_a_bad_list_query_is_a_400_with_its_param(client: OpenAI, query: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.list(extra_query=query)
    assert caught.value.param == next(iter(query))


def test_a_deleted_file_is_gone_from_disk_too(client: OpenAI, live_server: LiveServer) -> None:
    made = client.files.create(file=("x.jsonl", ROWS), purpose="fine-tune")
    assert len(_stored(live_server)) == 1
    assert client.files.delete(made.id).deleted is True
    assert _stored(live_server) == []
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            call(made.id)
        assert caught.value.body == {
            "message": f"No such File object: {made.id}",
            "type": "invalid_request_error",
            "param": "id",
            "code": None,
        }


@pytest.mark.parametrize("status", ["validating_files", "queued", "running", "paused"])
async def test_a_file_that_a_job_needs_cannot_be_deleted(client: OpenAI, database: Database, status: str) -> None:
    made = client.files.create(file=("x.jsonl", ROWS), purpose="fine-tune")
    job_id = await _job(database, made.id, status)
    with pytest.raises(openai.BadRequestError, match=job_id):
        client.files.delete(made.id)
    async with database.begin() as session:
        await session.execute(update(Job).values(status="succeeded", lease_owner=None))
    assert client.files.delete(made.id).deleted


async def _job(database: Database, file_id: str, status: str) -> str:
    job_id = new_id("ftjob-")
    async with database.begin() as session:
        session.add(
            Job(
                id=job_id,
                project_id=DEFAULT_PROJECT,
                status=status,
                model="m",
                training_file="file-other",
                validation_file=file_id,
                seed=1,
                method={},
                options={},
                created_at=time.time(),
            )
        )
    return job_id


async def test_an_expired_file_is_gone(client: OpenAI, database: Database, live_server: LiveServer) -> None:
    made = client.files.create(
        file=("x.jsonl", ROWS), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert made.expires_at == made.created_at + 3600
    async with database.begin() as session:
        await session.execute(update(File).values(expires_at=time.time() - 1))
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)
    assert client.files.list().data == []
    kept = client.files.create(file=("y.jsonl", ROWS), purpose="fine-tune")
    assert [path.name for path in _stored(live_server)] == [kept.id]


@pytest.mark.parametrize("seconds", [3599, 2_592_001])
def test_a_life_out_of_range_is_refused(client: OpenAI, seconds: int) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(
            file=("x", b"x"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": seconds}
        )
    assert caught.value.param == "expires_after.seconds"


@pytest.mark.parametrize("seconds", ["000000003600999999999", "9" * 5000])
def test_a_life_is_judged_by_all_of_its_digits(http: httpx.Client, seconds: str) -> None:
    form = {"purpose": "user_data", "expires_after[anchor]": "created_at", "expires_after[seconds]": seconds}
    refused = http.post("/v1/files", files={"file": ("x", b"x")}, data=form)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"].startswith("expires_after")


async def test_a_commit_that_is_done_but_reported_as_failed_keeps_the_bytes(
    client: OpenAI, live_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Database.begin

    @asynccontextmanager
    async def lies(database: Database) -> AsyncIterator[AsyncSession]:
        async with begin(database) as session:
            yield session
            made = any(isinstance(each, File) for each in (*session.new, *session.identity_map.values()))
        if made:
            raise OperationalError("", {}, Exception("the server went away"))

    monkeypatch.setattr(Database, "begin", lies)
    with pytest.raises(openai.InternalServerError):
        client.with_options(max_retries=0).files.create(file=("x.jsonl", ROWS), purpose="fine-tune")
    monkeypatch.undo()
    [file] = client.files.list().data
    assert client.files.content(file.id).read() == ROWS


def test_a_project_without_room_is_told_before_it_uploads(
    client: OpenAI, monkeypatch: pytest.MonkeyPatch, live_server: LiveServer
) -> None:
    monkeypatch.setattr("app.files.service.PROJECT_QUOTA_BYTES", len(ROWS))
    client.files.create(file=("x.jsonl", ROWS), purpose="fine-tune")
    monkeypatch.setattr("app.files.service.receive_form", None)  # not reached
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("y.jsonl", ROWS), purpose="fine-tune")
    assert caught.value.code == "quota_exceeded"


def test_a_file_above_the_limit_is_a_413_and_leaves_nothing(client: OpenAI, live_server: LiveServer) -> None:
    big = io.BytesIO(b"x" * (live_server.settings.max_file_bytes + 1))
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("big", big), purpose="user_data")
    assert (caught.value.status_code, caught.value.code) == (413, "file_too_large")
    assert _stored(live_server) == []


def test_a_far_larger_upload_still_gets_its_answer(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("big", io.BytesIO(b"x" * (64 * 1024**2))), purpose="user_data")
    assert caught.value.status_code == 413


def test_an_unknown_purpose_is_refused_by_name(client: OpenAI, live_server: LiveServer) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("x", b"x"), purpose="training")  # type: ignore[arg-type]
    assert caught.value.param == "purpose"
    assert _stored(live_server) == []


def test_missing_parts_and_other_bodies_are_400(http: httpx.Client) -> None:
    assert http.post("/v1/files", files={"file": ("x", b"x")}).json()["error"]["param"] == "purpose"
    assert http.post("/v1/files", data={"purpose": "fine-tune"}).status_code == 400
    assert http.post("/v1/files", json={}).status_code == 400
    assert http.post("/v1/files").status_code == 400


def test_another_project_sees_nothing(client: OpenAI, live_server: LiveServer, other_key: str) -> None:
    made = client.files.create(file=("x.jsonl", ROWS), purpose="fine-tune")
    with OpenAI(base_url=live_server.base_url, api_key=other_key, max_retries=0) as stranger:
        assert stranger.files.list().data == []
        with pytest.raises(openai.NotFoundError):
            stranger.files.retrieve(made.id)
        with pytest.raises(openai.BadRequestError):
            stranger.files.list(after=made.id)


def test_the_digest_is_of_what_was_sent(client: OpenAI, http: httpx.Client) -> None:
    rows = b"".join(json.dumps({"n": n}).encode() + b"\n" for n in range(100_000))
    made = client.files.create(file=("many.jsonl", io.BytesIO(rows)), purpose="fine-tune")
    assert http.get(f"/v1/files/{made.id}/content").content == rows


def test_the_strict_client_accepts_our_objects(live_server: LiveServer) -> None:
    with OpenAI(base_url=live_server.base_url, api_key=live_server.api_key, _strict_response_validation=True) as strict:
        made = strict.files.create(file=("x.jsonl", ROWS), purpose="fine-tune")
        assert strict.files.retrieve(made.id).id == made.id
        assert [file.id for file in strict.files.list()] == [made.id]
        assert strict.files.delete(made.id).deleted
        assert strict.models.list().data == []


def test_a_large_upload_without_a_key_gets_its_401(live_server: LiveServer) -> None:
    big = io.BytesIO(b"x" * (32 * 1024**2))
    with (
        OpenAI(base_url=live_server.base_url, api_key="sk-wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.files.create(file=("big", big), purpose="user_data")
    assert _stored(live_server) == []


def test_an_upload_that_breaks_off_leaves_nothing(live_server: LiveServer) -> None:
    host, port = live_server.url.removeprefix("http://").split(":")
    head = (
        "POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n"
        f"Authorization: Bearer {live_server.api_key}\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b"x" * 2_000_000)
        _until(lambda: len(_stored(live_server)) == 1)
    _until(lambda: _stored(live_server) == [])


def _until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)
