"""Children on a leash: they and their own children end with the parent, however it goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from workers import leash
from workers.process import FD, kill_group, log_tail, spawn, spawn_on_leash

FAMILY = ["sh", "-c", "sleep 60 & echo $!; wait"]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def grandchild(log: Path) -> int:
    until(lambda: log.exists() and log.read_text().endswith("\n"))
    return int(log.read_text().split()[-1])


def test_a_child_of_the_child_dies_when_the_parent_lets_go(tmp_path: Path) -> None:
    child = spawn_on_leash(FAMILY, log=tmp_path / "log", environment={})
    pid = grandchild(tmp_path / "log")
    assert not gone(pid)
    child.drop_leash()
    until(lambda: gone(pid))
    assert child.process.wait(5) == -signal.SIGKILL


def test_only_a_trusted_child_gets_our_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HONE_SECRET_KEY", "k-123")
    monkeypatch.setenv("HONE_DATABASE_URL_FILE", "/run/db")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s-789")
    given = {"HONE_SECRET_KEY": "k-456", "HONE_PORT": "1", "HONE_STORAGE_OPTIONS": '{"secret": "s-789"}'}
    for trusted in (False, True):
        log = tmp_path / f"{trusted}.log"
        child = spawn(["env"], log=log, environment=given, leash=(), trusted=trusted)
        assert child.process.wait(10) == 0
        child.drop_leash()
        said = log.read_text()
        assert "HONE_PORT=1" in said
        assert ("k-456" in said, "/run/db" in said, "s-789" in said, "k-123" in said) == (trusted,) * 3 + (False,)


def test_the_whole_family_dies_with_a_killed_parent(tmp_path: Path) -> None:
    script = (
        "import pathlib, time; from workers.process import spawn_on_leash; "
        f"child = spawn_on_leash({FAMILY!r}, log=pathlib.Path({str(tmp_path / 'log')!r}), environment={{}}); "
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    pid = grandchild(tmp_path / "log")
    parent.kill()
    parent.wait()
    until(lambda: gone(pid))


def test_a_held_command_gives_its_exit_code_and_its_output(tmp_path: Path) -> None:
    child = spawn_on_leash(["sh", "-c", "echo $WHO; exit 7"], log=tmp_path / "a" / "log", environment={"WHO": "me"})
    assert child.process.wait(10) == 7
    assert log_tail(tmp_path / "a" / "log") == "me"
    child.drop_leash()


def test_a_polite_child_is_stopped_within_its_grace(tmp_path: Path) -> None:
    child = spawn_on_leash(["sleep", "60"], log=tmp_path / "log", environment={})
    until(lambda: Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text())
    began = time.monotonic()
    child.stop(30.0)
    assert time.monotonic() - began < 20
    assert child.leash == -1


def test_a_stubborn_child_is_killed_with_its_group_after_the_grace(tmp_path: Path) -> None:
    command = ["sh", "-c", "trap '' TERM; sleep 60 & echo $!; while true; do wait; done"]
    child = spawn(command, log=tmp_path / "log", environment={}, leash=())
    pid = grandchild(tmp_path / "log")
    assert child.stop(0.1) == -signal.SIGKILL
    until(lambda: gone(pid))


def test_the_leash_is_named_in_the_command_and_no_other_descriptor_is_inherited(tmp_path: Path) -> None:
    code = "import json, os, sys; print(json.dumps([sys.argv[1:], sorted(map(int, os.listdir('/proc/self/fd')))]))"
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    child = spawn([sys.executable, "-I", "-S", "-c", code], log=tmp_path / "log", environment={}, leash=("--x", FD))
    child.process.wait(10)
    child.drop_leash()
    os.close(read_end)
    os.close(write_end)
    (option, held), descriptors = json.loads(log_tail(tmp_path / "log"))
    assert option == "--x"
    assert int(held) in descriptors
    assert write_end not in descriptors


def test_killing_what_is_gone_is_fine(tmp_path: Path) -> None:
    child = spawn(["true"], log=tmp_path / "log", environment={}, leash=())
    child.process.wait(10)
    kill_group(child.pid)
    child.terminate()
    child.kill()


def test_the_tail_of_a_log_is_its_end_and_no_log_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("first\n" + "x" * 5000 + "\nlast words\n")
    assert log_tail(tmp_path / "log", 20).endswith("last words")
    assert len(log_tail(tmp_path / "log", 20)) <= 20
    assert log_tail(tmp_path / "nothing") == ""


def test_a_leash_is_pulled_by_end_of_file_and_by_nothing_else() -> None:
    read_end, write_end = os.pipe()
    pulled = threading.Event()
    thread = leash.watch(read_end, pulled.set)
    os.write(write_end, b"still here")
    assert not pulled.wait(0.05)
    os.close(write_end)
    assert pulled.wait(5)
    thread.join(5)
    os.close(read_end)
