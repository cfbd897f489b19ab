"""The demo command: its report, its environment, and that no process of it is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from app.cli import demo, demo_probe
from app.cli.demo_processes import DemoFailed, children

SLEEPING_FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def command(source: str) -> list[str]:
    return [sys.executable, "-c", source]


def alive(pid: int) -> bool:
    """A zombie that waits for its new parent counts as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_report_has_exactly_the_promised_fields() -> None:
    measured = {
        "reward_mean": 0.3,
        "reward_se": 0.02,
        "greedy_reward_mean": 0.8,
        "tool_calls_mean": 1.0,
        "tool_error_rate": 0.1,
        "invented_rate": 0.2,
        "completion_tokens_mean": 38.0,
        "n": 128,
    }
    found = {
        "seed": 1,
        "model": "m",
        "baseline": measured,
        "final": measured,
        "seconds": {"training": 61.23, "startup": 9},
    }
    report = demo.summary(found, 300.04, 464.96)
    assert list(report) == ["seed", "model", "baseline", "final", "seconds", "gemm_gflops"]
    assert "invented_rate" not in report["final"]
    assert set(report["baseline"]) == set(measured) - {"invented_rate"}
    assert report["seconds"] == {
        "total": 300.0,
        "sampling": 0.0,
        "tools": 0.0,
        "grading": 0.0,
        "training": 61.2,
        "publication": 0.0,
        "evaluation": 0.0,
    }


def test_another_installations_settings_do_not_reach_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HONE_DATABASE_URL", "postgresql://production")
    monkeypatch.setenv("HONE_SECRET_KEY_FILE", "/run/secret")
    monkeypatch.setenv("HONE_THREADS", "2")
    monkeypatch.setenv("NO_PROXY", "example.org")
    env = demo._environment(tmp_path)
    assert not {"HONE_DATABASE_URL", "HONE_SECRET_KEY_FILE"} & set(env)
    assert env["HONE_THREADS"] == "2"
    assert env["HONE_DATA_DIR"] == str(tmp_path)
    assert env["no_proxy"] == "example.org,127.0.0.1,localhost"


def test_every_process_ends_with_the_demo_and_so_do_their_children(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), children() as started:
        family = started.start("family", command(SLEEPING_FAMILY), cwd=tmp_path, env=os.environ, log=tmp_path / "log")
        grandchild = int(family.first_line(30))
        raise KeyboardInterrupt
    deadline = time.monotonic() + 10
    while alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert family.returncode == -signal.SIGTERM
    assert not alive(grandchild)


def test_a_termination_signal_is_an_orderly_end() -> None:
    def terminated() -> None:
        with children():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        terminated()
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_process_that_does_not_start_says_why(tmp_path: Path) -> None:
    with children() as started:
        broken = command(
            "import sys, time; print('no such port', file=sys.stderr, flush=True); time.sleep(0.3); exit(1)"
        )
        child = started.start("server", broken, cwd=tmp_path, env=os.environ, log=tmp_path / "log")
        with pytest.raises(DemoFailed, match="server did not start: no such port"):
            child.first_line(30)


def test_without_the_examples_the_command_says_where_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    with pytest.raises(DemoFailed, match="source checkout"):
        demo.run(1, None, False, demo.Example.SHOP, time.monotonic())


def test_a_slower_host_is_told_a_longer_time() -> None:
    assert demo_probe.Speed(100.0, "float32").minutes > demo_probe.Speed(900.0, "bfloat16").minutes
