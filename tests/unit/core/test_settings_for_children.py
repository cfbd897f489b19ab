"""What a process hands down, so that its children have the same settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from app.core.settings import Settings


def test_a_child_has_the_same_settings_secrets_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Settings(
        data_dir=tmp_path,
        port=9,
        secret_key=SecretStr("k-1"),
        storage_url="s3://bucket/p",
        storage_options=SecretStr('{"secret": "s-1"}'),
    )
    for name, value in given.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == given


def test_no_secret_is_shown(tmp_path: Path) -> None:
    shown = repr(Settings(data_dir=tmp_path, secret_key=SecretStr("k-1"), storage_options=SecretStr('{"secret": "s"}')))
    assert "k-1" not in shown
    assert '"s"' not in shown
