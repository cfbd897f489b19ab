"""A key that asks too often is told when to come back, in the words that the official client understands."""

from __future__ import annotations

import time

import httpx
import openai
import pytest
from openai import OpenAI

from app.core.settings import Settings
from tests.api.live_server import LiveServer


@pytest.fixture
def settings(settings: Settings, request: pytest.FixtureRequest) -> Settings:
    """Three requests at once and hardly any after them, unless the test says otherwise."""
    per_minute, burst = getattr(request, "param", (1, 3))
    return settings.model_copy(update={"rate_limit_per_minute": per_minute, "rate_limit_burst": burst})


def test_each_answer_says_what_is_left(http: httpx.Client) -> None:
    seen = [http.get("/v1/files"), http.get("/v1/files/absent"), http.post("/v1/chat/completions", json={})]
    assert [answer.status_code for answer in seen] == [200, 404, 400]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in seen] == ["2", "1", "0"]
    assert {answer.headers["x-ratelimit-limit-requests"] for answer in seen} == {"3"}
    assert seen[0].headers["x-ratelimit-reset-requests"] == "1m0s"


def test_one_too_many_is_a_429_that_says_when_to_come_back(client: OpenAI) -> None:
    for _ in range(3):
        client.files.list()
    with pytest.raises(openai.RateLimitError) as caught:
        client.files.list()
    assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "requests")
    headers = caught.value.response.headers
    assert 55 <= int(headers["retry-after"]) <= 60
    assert int(headers["retry-after-ms"]) <= 60_000
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert client.api_key not in caught.value.message


def test_another_key_has_its_own(live_server: LiveServer, client: OpenAI, other_key: str) -> None:
    for _ in range(3):
        client.files.list()
    with OpenAI(base_url=live_server.base_url, api_key=other_key, max_retries=0) as other:
        other.files.list()


def test_health_and_strangers_are_not_counted(live_server: LiveServer, client: OpenAI) -> None:
    for _ in range(5):
        assert httpx.get(f"{live_server.url}/livez").status_code == 200
        refused = httpx.get(f"{live_server.base_url}/files", headers={"authorization": "Bearer nobody"})
        assert refused.status_code == 401
        assert "x-ratelimit-limit-requests" not in refused.headers
    client.files.list()


@pytest.mark.parametrize("settings", [(600, 1)], indirect=True)
def test_the_official_client_waits_and_goes_on(live_server: LiveServer) -> None:
    with OpenAI(base_url=live_server.base_url, api_key=live_server.api_key, max_retries=3) as patient:
        began = time.monotonic()
        for _ in range(4):
            patient.files.list()
        assert time.monotonic() - began >= 0.25


@pytest.mark.parametrize("settings", [(0, 1)], indirect=True)
def test_zero_means_no_limit(http: httpx.Client) -> None:
    answers = [http.get("/v1/files") for _ in range(5)]
    assert {answer.status_code for answer in answers} == {200}
    assert "x-ratelimit-limit-requests" not in answers[0].headers
