"""`hone keys` in this process: roles are kept and shown, a rotation says what it did and what remains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from app.cli.failure import CommandFailed
from app.cli.keys import commands
from app.security import rotation

OLD, NEW = "o" * 32, "n" * 32


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "SETTLE_S", 0.0)
    monkeypatch.delenv("HONE_SECRET_KEY", raising=False)


def keys(data: Path, *arguments: str) -> Result:
    return CliRunner().invoke(commands, [*arguments, "--data", str(data)])


def test_a_key_has_the_role_and_project_it_was_made_with(tmp_path: Path) -> None:
    assert keys(tmp_path, "create", "a", "--role", "read", "--project", "proj_x").exit_code == 0
    assert keys(tmp_path, "create", "b").exit_code == 0
    listed = json.loads(keys(tmp_path, "list", "--json").stdout)
    assert [(row["name"], row["project"], row["role"]) for row in listed] == [
        ("a", "proj_x", "read"),
        ("b", "proj_default", "run"),
    ]


def test_a_role_that_does_not_exist_is_wrong_usage(tmp_path: Path) -> None:
    assert keys(tmp_path, "create", "a", "--role", "root").exit_code == 2


def test_a_rotation_of_the_key_file_is_whole(tmp_path: Path) -> None:
    first = keys(tmp_path, "rotate")
    before = (tmp_path / "secret.key").read_text()
    second = keys(tmp_path, "rotate")
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert "0 rows were encrypted again." in second.stderr
    assert (tmp_path / "secret.key").read_text() != before
    assert len((tmp_path / "secret.key").read_text().split()) == 1


def test_with_a_setting_the_operator_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HONE_SECRET_KEY", OLD)
    assert keys(tmp_path, "create", "a").exit_code == 0
    refused = keys(tmp_path, "rotate").exception
    assert isinstance(refused, CommandFailed)
    assert "HONE_SECRET_KEY=NEW,OLD" in str(refused.fix)
    monkeypatch.setenv("HONE_SECRET_KEY", f"{NEW},{OLD}")
    assert "1 API keys need it until their next use (key_" in keys(tmp_path, "rotate-secret").stderr
    [row] = json.loads(keys(tmp_path, "list", "--json").stdout)
    assert keys(tmp_path, "revoke", row["id"]).exit_code == 0
    assert "leave the new key alone" in keys(tmp_path, "rotate-secret").stderr


def test_a_setting_that_is_empty_is_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HONE_SECRET_KEY", "")
    assert keys(tmp_path, "create", "a").exit_code == 0
    assert keys(tmp_path, "rotate-secret").exit_code == 0
    assert {"secret.key", "api_keys.secret"} <= {path.name for path in tmp_path.iterdir()}
