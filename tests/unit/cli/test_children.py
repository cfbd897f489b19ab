"""A child that dies comes back, one that is told to go goes, and none outlives its parent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.cli import children
from app.cli.children import Role, Stop, keep

DEADLINE_S = 30.0
LEASHED = """
    import os, sys, signal
    print("started", os.getpid(), flush=True)
    os.read(int(sys.argv[2]), 1)
"""
STUBBORN = """
    import signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("started", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def stop() -> Stop:
    return Stop()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
async def started(tmp_path: Path, stop: Stop, said: list[str]) -> AsyncIterator[object]:
    """Start a script as a kept child; everything is gone after the test."""
    tasks: list[asyncio.Task[None]] = []

    def start(script: str, grace_s: float = 5.0) -> asyncio.Task[None]:
        (tmp_path / "stub.py").write_text(textwrap.dedent(script))
        kept = keep(
            Role("stub", "stub"),
            environment={"PYTHONPATH": str(tmp_path)},
            logs=tmp_path / "logs",
            say=said.append,
            stop=stop,
            grace_s=grace_s,
            first_wait_s=0.05,
        )
        tasks.append(asyncio.create_task(kept))
        return tasks[-1]

    yield start
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _log_has(tmp_path: Path, text: str, times: int = 1) -> list[str]:
    deadline = time.monotonic() + DEADLINE_S
    log = tmp_path / "logs" / "stub.log"
    while time.monotonic() < deadline:
        lines = log.read_text().splitlines() if log.exists() else []
        if sum(text in line for line in lines) >= times:
            return lines
        await asyncio.sleep(0.02)
    raise AssertionError(f"{text!r} was not logged {times} times: {lines}")


async def test_a_child_that_dies_is_started_again_and_reported(tmp_path: Path, started, said) -> None:  # type: ignore[no-untyped-def]
    started("print('started', flush=True); raise SystemExit(7)")
    await _log_has(tmp_path, "started", times=3)
    assert said[0].startswith("the stub ended with status 7 after 0 s; starting it again in 0.05 s")
    assert "starting it again in 0.1 s" in said[1]  # each time later


async def test_a_killed_child_is_named_by_its_signal(tmp_path: Path, started, said) -> None:  # type: ignore[no-untyped-def]
    started(LEASHED)
    [line] = await _log_has(tmp_path, "started")
    os.kill(int(line.split()[1]), signal.SIGKILL)
    await _log_has(tmp_path, "started", times=2)
    assert "was killed by SIGKILL" in said[0]


async def test_asked_to_stop_the_child_gets_sigterm_and_is_not_reported(
    tmp_path: Path,
    started,
    stop: Stop,
    said,  # type: ignore[no-untyped-def]
) -> None:
    task = started(LEASHED)
    await _log_has(tmp_path, "started")
    stop.ask()
    await asyncio.wait_for(task, DEADLINE_S)
    assert said == []


async def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path, started, stop: Stop) -> None:  # type: ignore[no-untyped-def]
    task = started(STUBBORN, grace_s=0.3)
    await _log_has(tmp_path, "started")
    stop.ask()
    await asyncio.wait_for(task, DEADLINE_S)


async def test_asked_twice_it_does_not_wait_for_the_grace(tmp_path: Path, started, stop: Stop) -> None:  # type: ignore[no-untyped-def]
    task = started(STUBBORN, grace_s=600)
    await _log_has(tmp_path, "started")
    stop.ask()
    stop.ask()
    await asyncio.wait_for(task, DEADLINE_S)


async def test_the_leash_closes_when_the_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "stub.py").write_text(textwrap.dedent(LEASHED))
    parent = textwrap.dedent(f"""
        import asyncio
        from pathlib import Path
        from app.cli.children import Role, Stop, keep
        async def main():
            await keep(Role("stub", "stub"), environment={{"PYTHONPATH": {str(tmp_path)!r}}},
                       logs=Path({str(tmp_path / "logs")!r}), say=print, stop=Stop())
        asyncio.run(main())
    """)
    process = subprocess.Popen([sys.executable, "-c", parent])
    try:
        [line] = await _log_has(tmp_path, "started")
    finally:
        process.kill()
        process.wait()
    child = int(line.split()[1])
    deadline = time.monotonic() + DEADLINE_S
    while _alive(child) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    """A zombie that nobody reaps in a container counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_long_log_is_rotated_before_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "MAX_LOG_BYTES", 3)
    log = tmp_path / "stub.log"
    log.write_text("long")
    children._rotate(log)
    assert not log.exists()
    assert (tmp_path / "stub.log.1").read_text() == "long"
