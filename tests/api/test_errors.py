"""Every error has OpenAI's envelope, a request id, and is what the official client expects."""

from __future__ import annotations

import httpx


def _error(response: httpx.Response) -> dict[str, object]:
    assert response.headers["x-request-id"].startswith("req_")
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def test_an_unknown_url_answers_404_in_the_envelope(http: httpx.Client) -> None:
    response = http.get("/v1/nothing/here")
    assert response.status_code == 404
    assert _error(response)["message"] == "Invalid URL (GET /v1/nothing/here)."
