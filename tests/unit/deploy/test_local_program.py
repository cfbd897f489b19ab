"""A program of the local topology: waited for, started again when it dies, and no part of it left at its end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local import program as module
from deploy.local.program import Kept, Program, TopologyFailed
from tests.processes import gone


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def keep(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Keeping]]:
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.05)
    _Keeping.made, _Keeping.log, _Keeping.said = [], tmp_path / "program.log", said
    yield _Keeping
    for kept in _Keeping.made:
        kept.kill()


class _Keeping:
    made: list[Kept]
    log: Path
    said: list[str]

    @classmethod
    def of(cls, shell: str, ready: Path | None = None, **options: float) -> Kept:
        def missing() -> str | None:
            return None if ready is None or ready.exists() else "no file yet"

        kept = Kept(Program("worker", ("sh", "-c", shell), missing, **options), cls.log, cls.said.append)  # type: ignore[arg-type]
        cls.made.append(kept)
        kept.start()
        return kept


def _until(kept: Kept, condition: object) -> None:
    deadline = time.monotonic() + 20
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        kept.look()
        time.sleep(0.02)


def test_it_is_started_again_after_a_pause_that_grows(keep: type[_Keeping], said: list[str], tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    kept = keep.of(f"echo x >> {starts}")
    _until(kept, lambda: len(said) == 3)
    assert starts.read_text() == "x\n" * 3
    assert [line.split("again in ")[1].split(" s")[0] for line in said][1:] == ["0.1", "0.2"]


def test_one_that_ends_at_its_start_fails_with_its_last_words(keep: type[_Keeping], tmp_path: Path) -> None:
    kept = keep.of("echo no disk; exit 1", ready=tmp_path / "never")
    with pytest.raises(TopologyFailed, match=r"worker ended at its start:\nno disk"):
        kept.await_health()


def test_one_that_does_not_become_healthy_fails_with_the_reason(keep: type[_Keeping], tmp_path: Path) -> None:
    kept = keep.of("sleep 60", ready=tmp_path / "never", start_s=0.3)
    with pytest.raises(TopologyFailed, match=r"not healthy after 0\.3 s \(no file yet\)"):
        kept.await_health()


def test_its_end_takes_along_what_it_started_and_it_stays_ended(
    keep: type[_Keeping], said: list[str], tmp_path: Path
) -> None:
    ready = tmp_path / "ready"
    kept = keep.of(f"trap '' TERM; sleep 60 & touch {ready}; wait; sleep 60", ready=ready, stop_s=0.3)
    kept.await_health()
    group = kept.group
    kept.ask_to_end()
    kept.await_end()
    assert gone(group)
    assert said == ["worker did not end within 0.3 s and is killed"]
    kept.look()
    assert not kept.alive
