"""Files through the API with storage in S3: whole or refused, and an answer when it is away."""

from __future__ import annotations

import logging
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

from app.core.settings import Settings
from app.storage import remote
from tests import s3 as real
from tests.api.live_server import LiveServer
from tests.unit.storage.conftest import s3

__all__ = ["s3"]

ROWS = b'{"messages": []}\n' * 1000


@pytest.fixture
def settings(s3: real.S3, tmp_path: Path) -> Settings:
    return s3.settings(tmp_path / "data", max_file_bytes=1024**2)


def test_an_upload_lies_in_storage_and_nowhere_else(client: OpenAI, live_server: LiveServer) -> None:
    made = client.files.create(file=("röws.jsonl", ROWS), purpose="fine-tune")
    store = real.open_remote(live_server.settings, "files")
    assert [entry.key for entry in store.entries()] == [made.id]
    assert [path for path in live_server.settings.files_dir.rglob("*") if path.is_file()] == []
    answer = client.files.with_raw_response.content(made.id)
    assert answer.content == ROWS
    assert answer.headers["content-length"] == str(len(ROWS))
    assert answer.headers["content-disposition"] == "attachment; filename*=utf-8''r%C3%B6ws.jsonl"
    client.files.delete(made.id)
    assert store.entries() == []


def test_a_changed_byte_is_never_served(client: OpenAI, live_server: LiveServer, tmp_path: Path) -> None:
    made = client.files.create(file=("x.jsonl", ROWS), purpose="fine-tune")
    (tmp_path / "changed").write_bytes(ROWS.replace(b"messages", b"massages", 1))
    real.open_remote(live_server.settings, "files").put(tmp_path / "changed", made.id)
    with pytest.raises(openai.InternalServerError) as caught:
        client.files.content(made.id)
    assert (caught.value.code, caught.value.response.headers["x-should-retry"]) == ("file_damaged", "false")
    assert b"massages" not in caught.value.response.content


def test_what_storage_has_lost_is_a_404(client: OpenAI, live_server: LiveServer) -> None:
    made = client.files.create(file=("x.jsonl", ROWS), purpose="fine-tune")
    real.open_remote(live_server.settings, "files").delete(made.id)
    with pytest.raises(openai.NotFoundError, match="gone"):
        client.files.content(made.id)


def test_while_storage_is_away_requests_are_told_to_come_back(
    s3: real.S3, client: OpenAI, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = client.files.create(file=("x.jsonl", ROWS), purpose="fine-tune")
    monkeypatch.setattr(remote, "PAUSES_S", ())

    def away(self: remote.RemoteStore, key: str) -> tuple[object, str]:
        raise OSError(f"no route to {s3.endpoint} with {real.SECRET}")

    monkeypatch.setattr(remote.RemoteStore, "_at", away)
    with caplog.at_level(logging.ERROR):
        for answer in (
            http.get(f"/v1/files/{made.id}/content"),
            http.post("/v1/files", files={"file": ("y.jsonl", ROWS)}, data={"purpose": "fine-tune"}),
        ):
            assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "true")
            assert answer.json()["error"]["message"] == "The server's storage did not answer; try again."
    assert f"no route to {s3.endpoint} with ***" in caplog.text
    assert real.SECRET not in caplog.text
    assert http.get("/readyz").json()["missing"] == {"storage": "does not answer"}
    assert [file.id for file in client.files.list()] == [made.id]
    assert client.files.delete(made.id).deleted  # the row is what counts
