"""The command line from outside: fast, one line for an error, a key alone on standard output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.security.api_keys import well_formed
from tests.tiny import make_weightless_llama

HEAVY = {
    "torch",
    "transformers",
    "trl",
    "fastapi",
    "starlette",
    "uvicorn",
    "sqlalchemy",
    "alembic",
    "pydantic",
    "numpy",
    "httpx",
}


def hone(*arguments: str, data: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HONE_")}
    if data is not None:
        env["HONE_DATA_DIR"] = str(data)
    command = [sys.executable, "-m", "app.cli.main", *arguments]
    return subprocess.run(command, env={**kept, **env}, capture_output=True, text=True, timeout=100, check=False)


def test_importing_the_command_imports_nothing_heavy() -> None:
    code = "import sys, app.cli.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert HEAVY & {name.partition(".")[0] for name in done.stdout.split()} == set()


def test_help_is_quick() -> None:
    assert any(_timed() < 0.5 for _ in range(10))


def _timed() -> float:
    """Processor seconds of the child: other work on the host does not count."""
    before, began = os.times(), time.monotonic()
    assert hone("--help").returncode == 0
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return min(spent, time.monotonic() - began)


def test_a_key_stands_alone_on_standard_output(tmp_path: Path) -> None:
    done = hone("keys", "create", "me", "--data", str(tmp_path / "new"))
    assert done.returncode == 0, done.stderr
    key = done.stdout.removesuffix("\n")
    assert well_formed(key)
    assert key not in done.stderr


def test_keys_are_listed_without_themselves_and_revoked(tmp_path: Path) -> None:
    key = hone("keys", "create", "me", "--project", "proj_x", data=tmp_path).stdout.strip()
    listed = hone("keys", "list", "--json", data=tmp_path)
    [row] = json.loads(listed.stdout)
    assert (row["name"], row["project"], row["revoked"]) == ("me", "proj_x", None)
    assert key[10:-4] not in listed.stdout
    assert hone("keys", "revoke", row["id"], data=tmp_path).returncode == 0
    [row] = json.loads(hone("keys", "list", "--json", data=tmp_path).stdout)
    assert row["revoked"] is not None


def test_an_unknown_key_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    done = hone("keys", "revoke", "key_none", data=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: No such API key: key_none")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"HONE_PORT": "99999"}, "HONE_PORT"),
        ({"HONE_SECRET_KEY_FILE": "/nonexistent/file"}, "HONE_SECRET_KEY_FILE"),
    ],
)
def test_an_unreadable_setting_is_named(tmp_path: Path, env: dict[str, str], says: str) -> None:
    done = hone("models", "list", data=tmp_path, **env)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_usage_is_exit_code_2() -> None:
    assert hone("keys", "create").returncode == 2
    assert hone("nothing").returncode == 2


def test_an_unknown_model_name_says_what_would_work(tmp_path: Path) -> None:
    done = hone("models", "pull", "nothing-like-this", data=tmp_path)
    assert done.returncode == 1
    assert "smollm2-135m-instruct" in done.stderr
    assert json.loads(hone("models", "list", "--json", data=tmp_path).stdout) == []


def test_a_model_is_shown_with_what_its_check_found(tmp_path: Path) -> None:
    make_weightless_llama(tmp_path / "models" / "tiny")
    shown = hone("models", "show", "tiny", data=tmp_path).stdout
    assert "token history: exact" in shown
    assert "parallel calls: exact" in shown
    assert json.loads(hone("models", "show", "tiny", "--json", data=tmp_path).stdout)["check"]["append_only"] is True
    assert "exact" in hone("models", "list", data=tmp_path).stdout
    assert hone("models", "show", "none", data=tmp_path).returncode == 1


def test_a_data_directory_that_cannot_be_made_is_an_error_with_a_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = hone("keys", "create", "me", data=tmp_path / "file" / "data")
    assert done.returncode == 1
    assert "fix:   choose another with --data DIR" in done.stderr
