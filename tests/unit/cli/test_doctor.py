"""Each check finds what it is for, and says what to do."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from app.cli import demo_probe, doctor
from app.cli.demo_probe import Speed
from app.cli.doctor import Verdict
from app.cli.failure import BLOCKED
from app.core.settings import Settings
from app.db import migrate
from app.db.engine import create_sync


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return Settings(data_dir=tmp_path, port=probe.getsockname()[1])


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_probe, "measure", lambda: Speed(900.0, "bfloat16"))


def test_a_port_in_use_by_a_stranger_blocks(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", settings.port)) as stranger:
        stranger.close()
        assert [finding.verdict for finding in doctor.port(settings)] == [Verdict.OK]
    with socket.socket() as bound:  # bound and silent: nothing accepts, nothing else can listen
        bound.bind(("127.0.0.1", settings.port))
        [finding] = doctor.port(settings)
        assert finding.verdict is Verdict.PROBLEM
        assert doctor.run(settings, as_json=True) == BLOCKED
    assert {"name": "port", "verdict": "problem"}.items() <= json.loads(capsys.readouterr().out)[-1].items()


def test_the_database_is_absent_current_old_or_too_new(settings: Settings) -> None:
    assert [finding.detail for finding in doctor.database(settings)] == ["none yet; `hone up` makes it"]
    migrate.upgrade(settings.database)
    revision, keys = doctor.database(settings)
    assert (revision.verdict, keys.fix) == (Verdict.OK, "hone keys create NAME")
    engine = create_sync(settings.database)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'from_the_future'")
    engine.dispose()
    assert next(doctor.database(settings)).verdict is Verdict.PROBLEM


def test_missing_training_packages_block(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TRAIN", ("torch", "no_such_package"))
    finding = list(doctor.python(settings))[-1]
    assert (finding.verdict, finding.detail) == (Verdict.PROBLEM, "missing: no_such_package")
    assert finding.fix == "pip install 'hone-rft[train]'"


def test_a_directory_that_cannot_be_written_blocks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    [finding] = doctor.data_directory(Settings(data_dir=tmp_path / "file" / "data"))
    assert finding.verdict is Verdict.PROBLEM


def test_a_broken_model_is_named(settings: Settings) -> None:
    broken = settings.models_dir / "half"
    broken.mkdir(parents=True)
    (broken / "hone.json").write_text("{}")
    none, half = doctor.base_models(settings)
    assert none.fix == "hone models pull smollm2-135m-instruct"
    assert "half" in half.detail


def test_the_report_for_people_ends_with_a_count(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(settings, as_json=False) == 0
    shown = capsys.readouterr().out
    assert "900 GFLOPS in bfloat16" in shown
    assert "fix:" in shown
    assert "0 problems" in shown
