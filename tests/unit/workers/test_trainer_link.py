"""The supervisor's end of the pipe, against a script that stands in for the trainer."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from workers.messages import LoraSpec, Progress, Start, Step
from workers.trainer_link import TrainerDied, TrainerLink, TrainerSilent

FAKE = """
import json, os, sys, time
mode, out, commands = sys.argv[1], int(sys.argv[3]), int(sys.argv[5])
adapter = {"version": 0, "name": "a", "path": "p", "sha256": "s", "canary_log_probs": "c"}
def say(kind, **fields):
    os.write(out, json.dumps({"type": kind, **fields}).encode() + b"\\n")
print("chatter of a library", flush=True)
for line in os.fdopen(commands):
    ask = json.loads(line)
    if ask["type"] == "Start":
        if mode == "dies": print("out of memory", flush=True); os._exit(3)
        if mode == "silent": time.sleep(60)
        if mode == "babbles": os.write(out, b"hello\\n"); time.sleep(60)
        if mode == "floods": os.write(out, b"x" * 300000); time.sleep(60)
        if mode == "fails": say("Failed", error="CudaError", message="no device", traceback="Traceback …"); break
        if mode == "hasty": say("StepDone", step=1, adapter=adapter, snapshot="x", snapshot_sha256="y"); continue
        for done in (1, 2): say("Progress", phase="load", done=done, total=2); time.sleep(0.45 * (mode == "slow"))
        say("Ready", step=0, adapter=adapter, seconds=0.5)
    elif ask["type"] == "Step":
        if mode == "dies later": os.kill(os.getpid(), 9)
        step = ask["step"] + (mode == "off by one")
        say("StepDone", step=step, adapter={**adapter, "version": step}, snapshot="x", snapshot_sha256="y")
    elif ask["type"] == "Stop" and mode != "stubborn":
        sys.exit(0)
"""
START = Start(
    job_id="ftjob-1",
    model_path="m",
    adapters_dir="a",
    snapshots_dir="s",
    adapter_prefix="p",
    canary="c",
    seed=1,
    total_steps=2,
    learning_rate=1e-4,
    loss_type="dapo",
    lora=LoraSpec(1, 1, ("q",)),
    dtype="float32",
    threads=1,
)
Make = Callable[..., TrainerLink]


@pytest.fixture
async def trainer(tmp_path: Path) -> AsyncIterator[Make]:
    script = tmp_path / "trainer.py"
    script.write_text(FAKE)
    made: list[TrainerLink] = []

    def make(mode: str = "good", silence_s: float = 10.0) -> TrainerLink:
        link = TrainerLink(
            log=tmp_path / "logs" / "trainer.log",
            environment={},
            silence_s=silence_s,
            command=[sys.executable, "-I", "-S", str(script), mode],
        )
        made.append(link)
        return link

    yield make
    for link in made:
        await link.stop(0.1)


def gone(pid: int) -> bool:
    """No such process, or one that only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


async def test_it_answers_start_and_steps_and_leaves_on_stop(trainer: Make, tmp_path: Path) -> None:
    link, progress = trainer(), []
    link.on_progress = progress.append
    ready = await link.start(START)
    assert (ready.step, ready.adapter.name) == (0, "a")
    assert progress == [Progress("load", 1, 2), Progress("load", 2, 2)]
    assert [(await link.step(Step(n, "b", "s"))).adapter.version for n in (1, 2)] == [1, 2]
    began = time.monotonic()
    await link.stop(30.0)
    assert time.monotonic() - began < 20
    assert link.pid is not None and gone(link.pid)  # noqa: PT018
    assert "chatter of a library" in (tmp_path / "logs" / "trainer.log").read_text()


async def test_its_process_is_made_known_before_it_is_told_anything(trainer: Make) -> None:
    link, known = trainer(), []

    async def refuse(pid: int) -> None:
        known.append(pid)
        raise LookupError("the database is away")

    link.on_spawned = refuse
    with pytest.raises(LookupError):
        await link.start(START)
    assert known == [link.pid]
    assert not gone(known[0])  # it waits for its first message; `stop` ends it
    await link.stop(0.1)
    assert gone(known[0])


@pytest.mark.parametrize(
    ("mode", "words", "detail"),
    [
        ("dies", r"ended \(exit code 3\)", "out of memory"),
        ("fails", "the trainer failed: CudaError: no device", "Traceback …"),
        ("babbles", "not a message", "chatter"),
        ("floods", "not a message", "chatter"),
        ("hasty", "answered StepDone to Start", ""),
    ],
)
async def test_a_start_that_goes_wrong_says_how(trainer: Make, mode: str, words: str, detail: str) -> None:
    with pytest.raises(TrainerDied, match=words) as caught:
        await trainer(mode).start(START)
    assert detail in caught.value.detail


@pytest.mark.parametrize(
    ("mode", "words"), [("dies later", r"ended \(signal 9\)"), ("off by one", "answered StepDone to step 1")]
)
async def test_a_step_that_goes_wrong_says_how(trainer: Make, mode: str, words: str) -> None:
    link = trainer(mode)
    await link.start(START)
    with pytest.raises(TrainerDied, match=words):
        await link.step(Step(1, "b", "s"))


async def test_a_dead_trainer_stays_dead(trainer: Make) -> None:
    link = trainer("dies later")
    await link.start(START)
    for _ in range(2):
        with pytest.raises(TrainerDied, match="signal 9"):
            await link.step(Step(1, "b", "s"))


async def test_a_silent_trainer_is_killed(trainer: Make) -> None:
    link = trainer("silent", silence_s=0.3)
    with pytest.raises(TrainerSilent, match="reported nothing"):
        await link.start(START)
    assert link.pid is not None
    assert gone(link.pid)


async def test_progress_is_no_silence(trainer: Make) -> None:
    await trainer("slow", silence_s=0.85).start(START)  # 0.9 s in all, 0.45 at a time


async def test_another_thread_may_end_it_while_we_wait(trainer: Make) -> None:
    link = trainer("silent")
    waiting = asyncio.create_task(link.start(START))
    while link.pid is None:
        await asyncio.sleep(0.005)
    await asyncio.to_thread(link.kill_group)
    with pytest.raises(TrainerDied, match="signal 9"):
        await asyncio.wait_for(waiting, 5)


async def test_one_that_does_not_leave_is_killed_after_its_grace(trainer: Make) -> None:
    link = trainer("stubborn")
    await link.start(START)
    await link.stop(0.2)
    assert link.pid is not None
    assert gone(link.pid)


async def test_stopping_what_never_ran_or_ended_already_is_fine(trainer: Make) -> None:
    await trainer().stop()
    link = trainer("dies")
    with pytest.raises(TrainerDied):
        await link.start(START)
    await link.stop()
    await link.stop()
    link.kill_group()


async def test_no_descriptor_is_left_open(trainer: Make) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for mode in ("good", "good", "good"):
        link = trainer(mode)
        await link.start(START)
        await link.stop()
    await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) <= before
