"""Every error has OpenAI's envelope and a request id, and is what the official client expects."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from fastapi import FastAPI
from openai import OpenAI
from starlette.testclient import TestClient

from app.core.errors import Unavailable
from app.core.settings import Settings
from app.web.main import create_app
from app.web.middleware import MAX_BODY_BYTES
from tests.api.live_server import LiveServer


def _error(response: httpx.Response) -> dict[str, object]:
    assert response.headers["x-request-id"].startswith("req_")
    assert response.headers["openai-version"] == "2020-10-01"
    assert response.headers["openai-processing-ms"].isdecimal()
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def test_an_unknown_url_is_a_404(http: httpx.Client) -> None:
    response = http.get("/v1/nothing/here")
    assert (response.status_code, _error(response)["message"]) == (404, "Invalid URL (GET /v1/nothing/here).")


def test_a_wrong_method_is_a_405_that_says_what_is_allowed(http: httpx.Client) -> None:
    response = http.patch("/v1/files")
    assert (response.status_code, _error(response)["code"]) == (405, "method_not_allowed")
    assert "GET" in response.headers["allow"] or "POST" in response.headers["allow"]


def test_the_request_id_reaches_the_client_on_success_and_on_failure(client: OpenAI) -> None:
    assert client.files.list()._request_id is not None
    with pytest.raises(openai.NotFoundError) as caught:
        client.files.retrieve("file-none")
    assert caught.value.request_id is not None
    assert caught.value.request_id.startswith("req_")


def test_a_body_above_the_limit_is_a_413_by_its_declared_length(http: httpx.Client) -> None:
    body = b'"' + b"x" * MAX_BODY_BYTES + b'"'
    declared = http.post("/v1/models", content=body)
    assert declared.status_code == 413
    assert _error(declared)["code"] == "request_too_large"


def test_answers_cannot_be_sniffed_framed_or_cached(http: httpx.Client) -> None:
    headers = http.get("/livez").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["cache-control"] == "no-store"


@pytest.fixture
def broken(settings: Settings) -> Iterator[TestClient]:
    """The application with routes that fail in ways no real one should."""
    app: FastAPI = create_app(settings)

    @app.get("/bug")
    async def bug() -> None:
        raise RuntimeError("password=hunter2")

    @app.get("/busy")
    async def busy() -> None:
        raise Unavailable("No sampler yet.", retry_after_s=600)

    @app.post("/echo")
    async def echo(body: dict[str, int]) -> int:
        return len(body)

    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def test_a_bug_is_a_500_with_its_request_id_and_no_details(
    broken: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    response = broken.get("/bug")
    error = _error(response)  # type: ignore[arg-type]
    assert (response.status_code, error["type"]) == (500, "server_error")
    assert response.headers["x-request-id"] in str(error["message"])
    assert "hunter2" not in response.text
    assert "hunter2" in caplog.text


def test_unavailable_says_when_to_come_back(broken: TestClient) -> None:
    response = broken.get("/busy")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "120"  # above that the client would give up
    assert response.headers["x-should-retry"] == "true"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"{", "invalid_json", None),
        (b"[]", "invalid_type", None),
        (b'{"a": "x"}', "invalid_type", "a"),
        (b"", "missing_required_parameter", None),
    ],
)
def test_a_body_that_does_not_validate_is_a_400(broken: TestClient, body: bytes, code: str, param: str | None) -> None:
    response = broken.post("/echo", content=body, headers={"content-type": "application/json"})
    error = _error(response)  # type: ignore[arg-type]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)


def test_a_streamed_body_is_counted(broken: TestClient) -> None:
    response = broken.post("/echo", content=iter([b" " * 1024**2] * 9), headers={"content-type": "application/json"})
    assert (response.status_code, _error(response)["code"]) == (413, "request_too_large")  # type: ignore[arg-type]


def test_a_length_of_nothing_hides_no_body(live_server: LiveServer) -> None:
    """Where both are given, chunked wins (RFC 9112 §6.3)."""
    where = urlsplit(live_server.url)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((where.hostname, where.port), timeout=20) as connection:
        connection.sendall(f"{head}Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(MAX_BODY_BYTES // 1024**2 + 1):
                connection.sendall(b"100000\r\n" + b" " * 1024**2 + b"\r\n")
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413"), answer


def test_health_names_what_is_missing(http: httpx.Client, live_server: LiveServer) -> None:
    response = http.get("/healthz")
    assert response.status_code == 503
    assert "runner" in response.json()["missing"]
