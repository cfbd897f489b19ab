"""Sealing of header values: bound to their row, opened by rotated keys, never readable in an error."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.security.vault import Vault, VaultError, load_vault

OLD, NEW = "o" * 32, "n" * 32


def test_a_sealed_value_opens_in_its_row_only() -> None:
    vault = Vault([OLD])
    token = vault.seal("Bearer pässword", "ftjob-1")
    assert vault.open(token, "ftjob-1") == "Bearer pässword"
    assert "ssword" not in token
    with pytest.raises(VaultError, match="another row"):
        vault.open(token, "ftjob-2")


def test_the_same_text_is_sealed_differently_each_time() -> None:
    vault = Vault([OLD])
    assert vault.seal("a", "r") != vault.seal("a", "r")


def test_a_rotated_vault_opens_old_tokens_and_seals_with_the_new_key() -> None:
    old = Vault([OLD]).seal("a", "r")
    rotated = Vault([NEW, OLD])
    assert rotated.open(old, "r") == "a"
    assert not rotated.is_current(old)
    new = rotated.seal("a", "r")
    assert rotated.is_current(new)
    with pytest.raises(VaultError, match="sealed with the key"):
        Vault([OLD]).open(new, "r")


@pytest.mark.parametrize("damage", ["", "x", "v1.abc", "v2", "flip", "cut", "umlaut"])
def test_a_damaged_token_is_an_error_without_content(damage: str) -> None:
    vault = Vault([OLD])
    token = vault.seal("s3cr3t", "r")
    flipped = token[:-6] + ("A" if token[-6] != "A" else "B") + token[-5:]
    damaged = {"flip": flipped, "cut": token[:30], "v2": "v2" + token[2:], "umlaut": token + "é"}.get(damage, damage)
    with pytest.raises(VaultError) as error:
        vault.open(damaged, "r")
    assert "s3cr3t" not in str(error.value)


def test_the_key_file_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with ThreadPoolExecutor(8) as pool:
        vaults = list(pool.map(lambda _: load_vault(None, data_dir), range(8)))
    assert vaults[0].open(vaults[7].seal("a", "r"), "r") == "a"
    assert [path.name for path in data_dir.iterdir()] == ["secret.key"]
    assert stat.S_IMODE((data_dir / "secret.key").stat().st_mode) == 0o600


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    load_vault(None, tmp_path)
    (tmp_path / "secret.key").chmod(0o644)
    with pytest.raises(VaultError, match="chmod 600"):
        load_vault(None, tmp_path)


def test_the_setting_wins_over_the_file_and_lists_the_newest_first(tmp_path: Path) -> None:
    vault = load_vault(f"{NEW}, {OLD}", tmp_path)
    assert not (tmp_path / "secret.key").exists()
    assert vault.is_current(Vault([NEW]).seal("a", "r"))


def test_a_short_key_is_refused_without_being_shown() -> None:
    with pytest.raises(VaultError) as error:
        Vault(["hunter2"])
    assert "hunter2" not in str(error.value)
