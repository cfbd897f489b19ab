"""The trainer as a process: it speaks only on its descriptors, says how it failed, and dies with its supervisor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGKILL

from tiny_policy import make_rows, make_start, make_step

from workers.messages import Failed, Message, Progress, Ready, StepDone, Stop, decode, encode


class Child:
    def __init__(self, process: subprocess.Popen[bytes], write_fd: int, read_fd: int) -> None:
        self.process, self._down, self._up = process, os.fdopen(write_fd, "wb", 0), os.fdopen(read_fd, "rb")

    def send(self, message: Message) -> None:
        self._down.write(encode(message))

    def next(self) -> Message:
        while isinstance(message := decode(self._up.readline()), Progress):
            pass
        return message

    def hang_up(self) -> None:
        self._down.close()

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, SIGKILL)
            self.process.wait(10)
        self._down.close()
        self._up.close()


@contextmanager
def trainer(log: Path) -> Iterator[Child]:
    down_read, down_write = os.pipe()
    up_read, up_write = os.pipe()
    command = [sys.executable, "-m", "workers.trainer", "--in-fd", str(down_read), "--out-fd", str(up_write)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, pass_fds=(down_read, up_write), start_new_session=True, stdout=out, stderr=subprocess.STDOUT
        )
    os.close(down_read)
    os.close(up_write)
    child = Child(process, down_write, up_read)
    try:
        yield child
    finally:
        child.end()


def test_it_trains_answers_and_leaves_on_stop(llama: Path, tmp_path: Path) -> None:
    with trainer(tmp_path / "log") as child:
        child.send(make_start(tmp_path, llama, total_steps=1))
        assert isinstance(child.next(), Ready)
        child.send(make_step(tmp_path, 1, make_rows(1)))
        assert isinstance(child.next(), StepDone)
        child.send(Stop())
        child.hang_up()
        assert child.process.wait(30) == 0


def test_nothing_is_sent_home_and_no_other_launcher_is_believed() -> None:
    code = (
        "from workers.trainer.__main__ import prepare_process; prepare_process(0); import os; "
        "from huggingface_hub import constants as c; from accelerate import PartialState; "
        "assert c.HF_HUB_DISABLE_TELEMETRY and c.HF_HUB_OFFLINE; assert PartialState().num_processes == 1; "
        "print(os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    foreign = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "3,4"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **foreign}, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout.strip(), done.returncode) == ("3", 0), done.stderr


def test_end_of_file_kills_the_whole_group_at_once(llama: Path, tmp_path: Path) -> None:
    with trainer(tmp_path / "log") as child:
        child.send(make_start(tmp_path, llama))
        child.hang_up()
        assert child.process.wait(30) == -SIGKILL


def test_a_failure_is_told_with_its_traceback(tmp_path: Path) -> None:
    with trainer(tmp_path / "log") as child:
        child.send(make_start(tmp_path, tmp_path / "nothing-here"))
        failed = child.next()
        assert isinstance(failed, Failed)
        assert "nothing-here" in failed.message
        assert "Traceback" in failed.traceback
        assert child.process.wait(30) == 1
