"""`hone webhooks` from the outside: a secret alone on standard output, once; a list without it; one line for a refusal.

Does not cover: what a secret signs (`test_signing`).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli.webhooks import commands
from app.core.errors import InvalidRequest, NotFound


@pytest.fixture
def hone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("HONE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("HONE_SECRET_KEY", raising=False)
    return CliRunner()


def run(hone: CliRunner, *arguments: str) -> str:
    done = hone.invoke(commands, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_an_endpoint_from_add_to_remove(hone: CliRunner) -> None:
    first = run(hone, "add", "https://example.com/h?token=abcdef", "--events", "failed, fine_tuning.job.paused")
    assert first.startswith("whsec_")
    assert len(first.split()) == 1
    listed = run(hone, "list", "--json")
    (row,) = json.loads(listed)
    assert row["events"] == ["fine_tuning.job.failed", "fine_tuning.job.paused"]
    assert row["state"] == "on"
    assert "abcdef" not in listed
    assert first.strip() not in listed
    second = run(hone, "rotate", row["id"])
    assert second.startswith("whsec_")
    assert second != first
    assert row["id"] in run(hone, "list")
    run(hone, "remove", row["id"])
    assert json.loads(run(hone, "list", "--json")) == []


def test_another_project_has_endpoints_of_its_own(hone: CliRunner) -> None:
    run(hone, "add", "https://example.com/h", "--project", "proj_b")
    assert json.loads(run(hone, "list", "--json")) == []
    (row,) = json.loads(run(hone, "list", "--json", "--project", "proj_b"))
    with pytest.raises(NotFound):
        run(hone, "remove", row["id"])


@pytest.mark.parametrize("wrong", [["ftp://example.com"], ["https://example.com", "--events", "created"]])
def test_a_bad_url_or_event_is_refused(hone: CliRunner, wrong: list[str]) -> None:
    with pytest.raises(InvalidRequest):
        run(hone, "add", *wrong)
