"""Header values are sealed in the database and masked on answers, wherever they stand. Does not cover: the cipher."""

from __future__ import annotations

import json
from typing import Any

from app.jobs.headers import mask_headers, open_headers, seal_headers
from app.security.vault import Vault

VAULT = Vault(["k" * 32])
METHOD: dict[str, Any] = {
    "type": "reinforcement",
    "reinforcement": {
        "tools": [{"name": "lookup", "server_url": "http://h/", "headers": {"Authorization": "tool-secret"}}],
        "grader": {
            "type": "multi",
            "graders": {
                "headers": {"type": "string_check", "name": "headers", "input": "a", "reference": "b"},
                "remote": {"type": "endpoint", "url": "http://h/", "headers": {"X-Key": "grader-secret"}},
            },
        },
        "response_format": {"json_schema": {"schema": {"properties": {"headers": {"type": "string"}}}}},
    },
}


def test_sealed_headers_open_again_for_the_same_job_only() -> None:
    sealed = seal_headers(METHOD, VAULT, "ftjob-1")
    assert "secret" not in json.dumps(sealed)
    assert open_headers(sealed, VAULT, "ftjob-1") == METHOD


def test_masked_headers_keep_their_names() -> None:
    masked = mask_headers(METHOD)["reinforcement"]
    assert masked["tools"][0]["headers"] == {"Authorization": "***"}
    assert masked["grader"]["graders"]["remote"]["headers"] == {"X-Key": "***"}


def test_what_is_only_called_headers_stays_as_it_is() -> None:
    for changed in (mask_headers(METHOD), seal_headers(METHOD, VAULT, "ftjob-1")):
        assert changed["reinforcement"]["grader"]["graders"]["headers"]["reference"] == "b"
        assert changed["reinforcement"]["response_format"] == METHOD["reinforcement"]["response_format"]
