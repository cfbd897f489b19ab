"""The doctor on keys: what is sealed must open, API keys must be known, and looking makes no key file."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cli.doctor_secrets import Stored, keys, sealed
from app.cli.findings import Verdict
from app.core.settings import Settings
from app.security.api_keys import KeyRing, load_peppers
from app.security.vault import load_vault

OURS, OTHER = "o" * 40, "x" * 40


def settings(root: Path, secret: str | None = None) -> Settings:
    return Settings.model_validate({"data_dir": root, "secret_key": secret})


def stored(root: Path, secret: str | None) -> Stored:
    """One job with a header, one endpoint and one API key, as that secret left them."""
    vault = load_vault(secret, root)
    method = {"reinforcement": {"tools": [{"headers": {"authorization": vault.seal("x", "ftjob-1")}}]}}
    digest = KeyRing(load_peppers(settings(root, secret))).digests("sk-hone-x")[0]
    return Stored([("ftjob-1", method)], [("we_1", vault.seal("y", "we_1"))], [digest])


def test_the_right_key_opens_everything(tmp_path: Path) -> None:
    for secret in (None, OURS):
        rows = stored(tmp_path, secret)
        assert sealed(settings(tmp_path, secret), rows).verdict is Verdict.OK
        assert keys(settings(tmp_path, secret), rows.digests).verdict is Verdict.OK


def test_another_key_blocks_and_names_a_row_but_no_key(tmp_path: Path) -> None:
    rows = stored(tmp_path, OURS)
    found = sealed(settings(tmp_path, OTHER), rows)
    assert (found.verdict, found.detail) == (
        Verdict.PROBLEM, "HONE_SECRET_KEY does not open 2 of 2 rows, such as ftjob-1",
    )  # fmt: skip
    assert OTHER not in str(found)
    assert keys(settings(tmp_path, OTHER), rows.digests).verdict is Verdict.PROBLEM
    assert sealed(settings(tmp_path, f"{OTHER},{OURS}"), rows).verdict is Verdict.OK


def test_a_lost_key_file_is_missed_and_not_made(tmp_path: Path) -> None:
    rows = stored(tmp_path, None)
    for name in ("secret.key", "api_keys.secret"):
        (tmp_path / name).unlink()
    found = sealed(settings(tmp_path), rows)
    assert found.verdict is Verdict.PROBLEM
    assert found.detail.startswith(f"{tmp_path / 'secret.key'} is missing, and 2 rows are sealed")
    assert "api_keys.secret is missing" in keys(settings(tmp_path), rows.digests).detail
    assert list(tmp_path.iterdir()) == []


def test_nothing_sealed_needs_no_key(tmp_path: Path) -> None:
    plain = Stored([("ftjob-1", {"reinforcement": {"tools": [{"name": "x"}]}})])
    assert sealed(settings(tmp_path), plain).verdict is Verdict.OK
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("secret", "fix"), [("short", "make one: python -c"), (None, "chmod 600 ")])
def test_a_key_that_cannot_be_used_blocks(tmp_path: Path, secret: str | None, fix: str) -> None:
    load_vault(None, tmp_path)
    (tmp_path / "secret.key").chmod(0o644)
    found = sealed(settings(tmp_path, secret), Stored())
    assert found.verdict is Verdict.PROBLEM
    assert (found.fix or "").startswith(fix)


def test_some_keys_of_an_older_secret_only_warn(tmp_path: Path) -> None:
    new, old = (stored(tmp_path, secret).digests[0] for secret in (OURS, OTHER))
    found = keys(settings(tmp_path, OURS), [new, old])
    assert (found.verdict, found.detail[:20]) == (Verdict.WARNING, "1 of 2 API keys were")


def test_without_keys_the_command_that_makes_one_is_named(tmp_path: Path) -> None:
    assert keys(settings(tmp_path), []).fix == "hone keys create NAME"
