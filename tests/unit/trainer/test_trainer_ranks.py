"""Two ranks make the update that one makes, and neither outlives the other."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_trainer_process import Child, trainer
from tiny_policy import Supervisor, make_rows, make_start, make_step

from workers.messages import Failed, Ready, Start, Step, StepDone, Stop
from workers.trainer import budget
from workers.trainer.ranks import visible_device
from workers.trainer.session import Session

UNEVEN = make_rows(1, groups=3, siblings=3)
STEPS = [UNEVEN, UNEVEN[:1], make_rows(2)]  # the second has a row for one rank only
EXTRAS: dict[str, Any] = {"beta": 0.1, "importance_range": (0.2, 5.0), "max_sequence_tv": 3.0, "loss_type": "cispo"}


def ranks_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def await_gone(*pids: int) -> None:
    deadline = time.monotonic() + 10
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived the other"
        time.sleep(0.02)


def take_steps(child: Child, start: Start, steps: list[Step]) -> list[StepDone]:
    child.send(start)
    ready = child.next()
    assert isinstance(ready, Ready), ready
    done = []
    for step in steps:
        child.send(step)
        answer = child.next()
        assert isinstance(answer, StepDone), answer
        done.append(answer)
    return done


def adapter(done: StepDone) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(Path(done.adapter.path) / "adapter_model.safetensors")
    return tensors


def test_two_ranks_publish_what_one_publishes_and_go_on_from_its_snapshot(llama: Path, tmp_path: Path) -> None:
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    alone.mkdir()
    pair.mkdir()
    supervisor = Supervisor([make_step(alone, step + 1, rows) for step, rows in enumerate(STEPS)])
    Session(make_start(alone, llama, **EXTRAS), supervisor).run()
    wanted = supervisor.of(StepDone)

    steps = [make_step(pair, step + 1, rows) for step, rows in enumerate(STEPS)]
    with trainer(tmp_path / "log") as child:
        done = take_steps(child, make_start(pair, llama, processes=2, **EXTRAS), steps)
        pids = [child.process.pid, *ranks_of(child.process.pid)]
        assert [os.getpgid(pid) for pid in pids] == [child.process.pid] * 2
        os.kill(child.process.pid, signal.SIGKILL)
        await_gone(*pids)
    for ours, theirs in zip(done, wanted, strict=True):
        one, other = adapter(ours), adapter(theirs)
        assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-5
        for name in ("loss", "grad_norm", "trained_tokens", "importance_p99", "kl_to_base", "mismatch_kl_depth_1"):
            assert ours.metrics.get(name) == pytest.approx(theirs.metrics.get(name), rel=1e-3, abs=1e-6), name
    assert done[0].metrics["micro_batches"] == 2

    start = make_start(pair, llama, attempt=2, processes=2, snapshot=done[1].snapshot, **EXTRAS)
    with trainer(tmp_path / "log") as child:
        (resumed,) = take_steps(child, start, steps[2:])
        child.send(Stop())
        assert child.process.wait(30) == 0
    assert resumed.adapter.sha256 == done[2].adapter.sha256
    assert resumed.snapshot_sha256 == done[2].snapshot_sha256


def test_a_base_split_over_two_ranks_gives_the_same_update(llama: Path, tmp_path: Path) -> None:
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    alone.mkdir()
    pair.mkdir()
    steps = [make_step(alone, step + 1, rows) for step, rows in enumerate(STEPS)]
    supervisor = Supervisor(list(steps))
    Session(make_start(alone, llama, **EXTRAS), supervisor).run()
    with trainer(tmp_path / "log") as child:
        done = take_steps(child, make_start(pair, llama, processes=2, shard_base=True, **EXTRAS), steps)
    for ours, theirs in zip(done, supervisor.of(StepDone), strict=True):
        one, other = adapter(ours), adapter(theirs)
        assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-5
        assert ours.metrics["trained_tokens"] == theirs.metrics["trained_tokens"]
        scores = [json.loads(Path(each.adapter.canary_log_probs).read_text()) for each in (ours, theirs)]
        assert scores[0] == [pytest.approx(row, abs=1e-4) for row in scores[1]]


def test_a_rank_that_dies_takes_the_others_along_and_is_named(llama: Path, tmp_path: Path) -> None:
    with trainer(tmp_path / "log") as child:
        child.send(make_start(tmp_path, llama, processes=2))
        while not (ranks := ranks_of(child.process.pid)):
            time.sleep(0.01)
        os.kill(ranks[0], signal.SIGKILL)
        failed = child.next()
        assert isinstance(failed, Failed)
        assert "rank 1 of the trainer ended (signal 9)" in failed.message
        await_gone(child.process.pid, *ranks)


def test_a_rank_that_cannot_start_says_why(llama: Path, tmp_path: Path) -> None:
    with trainer(tmp_path / "log") as child:
        child.send(make_start(tmp_path, tmp_path / "nothing-here", processes=2))
        failed = child.next()
        assert isinstance(failed, Failed)
        assert "nothing-here" in failed.message
        assert child.process.wait(30) in (1, -signal.SIGKILL)


def test_every_row_goes_to_exactly_one_rank_and_ranks_get_equal_work() -> None:
    rows = [row.ids for row in make_rows(3, groups=8)]
    for size in (1, 2, 3, 5):
        shares = [budget.share(rows, rank, size) for rank in range(size)]
        assert sorted(index for share in shares for index in share) == list(range(len(rows)))
        work = [budget.forwarded([rows[i] for i in s], budget.packed([rows[i] for i in s], WIDE)) for s in shares]
        assert max(work) - min(work) < 2 * max(map(len, rows))
    assert [budget.share([[1, 2, 3]], rank, 2) for rank in range(2)] in ([[0], []], [[], [0]])


WIDE = budget.Budget(100_000)


def test_a_rank_sees_one_gpu_of_those_left_visible() -> None:
    assert [visible_device({}, rank) for rank in range(3)] == ["0", "1", "2"]
    assert [visible_device({"CUDA_VISIBLE_DEVICES": "4, 6"}, rank) for rank in range(3)] == ["4", "6", ""]
    assert visible_device({"CUDA_VISIBLE_DEVICES": ""}, 0) == ""
