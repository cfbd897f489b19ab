"""A worker that is there before the tables waits for them, and says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cli import migrated
from app.cli.failure import CommandFailed
from app.cli.migrated import await_migration
from app.core.settings import Settings
from app.db import migrate


def test_it_waits_until_somebody_has_migrated_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(data_dir=tmp_path)
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            migrate.upgrade(settings.database)

    monkeypatch.setattr(migrated.time, "sleep", sleep)
    await_migration(settings)
    assert len(looks) == 3
    assert capsys.readouterr().err == "hone: waiting: the database has no tables yet\n"


def test_it_gives_up_and_names_who_migrates(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="no tables yet") as caught:
        await_migration(Settings(data_dir=tmp_path), patience_s=0.0)
    assert "hone api" in str(caught.value.fix)


def test_a_database_that_another_version_migrated_is_not_worked_on(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    migrate.upgrade(settings.database)
    migrate.downgrade(settings.database, "base")
    with pytest.raises(CommandFailed, match="at revision None, this code needs"):
        await_migration(settings, patience_s=0.0)
