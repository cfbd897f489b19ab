"""Each check finds what it is for, and says what to do."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest

from app.cli import demo_probe, doctor, doctor_host, doctor_storage
from app.cli.demo_probe import Speed
from app.cli.doctor_storage import data_directory, storage
from app.cli.failure import BLOCKED
from app.cli.findings import Verdict
from app.core.settings import Settings


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


def test_missing_training_packages_block(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_host, "TRAIN", ("torch", "no_such_package"))
    finding = list(doctor_host.python(settings))[-1]
    assert (finding.verdict, finding.detail) == (Verdict.PROBLEM, "missing: no_such_package")
    assert finding.fix == "pip install 'hone-rft[train]'"


def test_a_host_that_is_not_ours_and_a_port_of_root_block(settings: Settings) -> None:
    [elsewhere] = doctor.port(settings.model_copy(update={"host": "192.0.2.1"}))
    assert (elsewhere.verdict, elsewhere.fix) == (Verdict.PROBLEM, doctor.LOCAL)
    [unknown] = doctor.port(settings.model_copy(update={"host": "no-such-host.invalid"}))
    assert (unknown.verdict, unknown.fix) == (Verdict.PROBLEM, doctor.LOCAL)


def test_a_place_that_cannot_be_a_directory_blocks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    [finding] = data_directory(Settings(data_dir=tmp_path / "file" / "data"))
    assert (finding.verdict, finding.detail) == (Verdict.PROBLEM, f"{tmp_path / 'file'} is no directory")


def test_a_directory_below_that_cannot_be_written_blocks(settings: Settings) -> None:
    """Really written: permissions say little to root, and nothing of a disk that is full or mounted read-only."""
    assert next(data_directory(settings)).verdict is Verdict.OK
    settings.files_dir.write_text("in the way")
    [finding] = data_directory(settings)
    assert (finding.verdict, finding.detail) == (
        Verdict.PROBLEM, f"{settings.files_dir} cannot be written: Not a directory",
    )  # fmt: skip
    assert (finding.fix or "").startswith(f"mv {settings.files_dir} ")


def test_a_disk_that_hangs_blocks(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    woken = threading.Event()
    monkeypatch.setattr(doctor_storage, "_write", lambda path: woken.wait(30))
    monkeypatch.setattr(doctor_storage, "DEADLINE_S", 0.1)
    [finding] = data_directory(settings)
    woken.set()
    assert (finding.verdict, finding.detail) == (Verdict.PROBLEM, f"{settings.root}: no answer within 0.1 s")


def test_storage_elsewhere_is_written_and_read(settings: Settings, tmp_path: Path) -> None:
    assert list(storage(settings)) == []
    elsewhere = settings.model_copy(update={"storage_url": str(tmp_path / "there")})
    assert [finding.verdict for finding in storage(elsewhere)] == [Verdict.OK]
    (tmp_path / "in-the-way").write_text("")
    blocked = settings.model_copy(update={"storage_url": str(tmp_path / "in-the-way")})
    [finding] = storage(blocked)
    assert finding.verdict is Verdict.PROBLEM
    assert str(tmp_path / "in-the-way") in finding.detail


@pytest.mark.parametrize(
    ("gpus", "torch", "cards", "said"),
    [
        (["H200, 143771 MiB"], "2.9.0+cu130", True, "H200"),
        (["H200, 143771 MiB"], "2.9.0+cpu", True, "torch 2.9.0+cpu is a build for the CPU"),
        ([], "2.9.0", True, "an NVIDIA card is there, but nvidia-smi does not answer"),
        ([], "2.9.0", False, "none: jobs sample on the built-in engine and train on the CPU"),
    ],
)
def test_what_stands_between_a_job_and_a_gpu(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, gpus: list[str], torch: str, cards: bool, said: str
) -> None:
    monkeypatch.setattr(doctor_host, "_gpus", lambda: gpus)
    monkeypatch.setattr(doctor_host, "_nvidia_cards", lambda: cards)
    monkeypatch.setattr(doctor_host, "_version", lambda name: torch)
    finding = next(finding for finding in doctor_host.processor(settings) if finding.name == "gpu")
    assert said in finding.detail
    assert (finding.fix is None) == (finding.verdict is Verdict.OK) == torch.endswith("cu130")


def test_cards_are_found_on_the_bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_host, "PCI", tmp_path)
    for name, vendor, kind in (("a", "0x8086", "0x030000"), ("b", "0x10de", "0x040300")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    assert not doctor_host._nvidia_cards()  # another's card, and only the sound of one
    (tmp_path / "b" / "class").write_text("0x030200\n")
    assert doctor_host._nvidia_cards()


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
