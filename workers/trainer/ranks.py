"""The other ranks of an update as processes: children of rank 0, in its group, on its leash.

Does not cover: what ranks say to each other (`workers.trainer.world`). Standard library only: it runs before torch is
imported, so that all ranks import at the same time.

Why not `accelerate launch` or `torchrun`: their agent starts workers in sessions of their own with every descriptor
closed, so the pipe would not reach rank 0 and the supervisor's kill would not reach the ranks (decision 009).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from workers.messages import Failed, ProtocolError, decode, encode


class Ranks:
    """Processes 1 … `size` - 1. `on_death` is called from a thread when one is gone before `leave`."""

    def __init__(self, size: int, on_death: Callable[[Failed], None]) -> None:
        self._on_death, self._leaving = on_death, threading.Event()
        self._directory = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.rendezvous = self._directory / "meeting-point"
        self._children = {rank: _start(rank, size, self.rendezvous) for rank in range(1, size)}
        for rank in self._children:
            threading.Thread(target=self._watch, args=(rank,), name=f"rank {rank}", daemon=True).start()

    def failure(self, wait_s: float) -> Failed | None:
        """Why a rank ended, if one does within `wait_s`: what rank 0 sees itself is then only a broken connection."""
        deadline = time.monotonic() + wait_s
        while self._children and time.monotonic() < deadline:
            for rank, child in self._children.items():
                if child.process.poll():
                    return self._why(rank, child.process.returncode)
            time.sleep(0.02)
        return None

    def leave(self, grace_s: float) -> None:
        """Wait for ranks that were told to stop, end the others, and clean up."""
        self._leaving.set()
        deadline = time.monotonic() + grace_s
        for child in self._children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
            child.process.kill()
            child.process.wait()
            os.close(child.leash)
        self._children = {}
        shutil.rmtree(self._directory, ignore_errors=True)

    def _watch(self, rank: int) -> None:
        code = self._children[rank].process.wait()
        if code and not self._leaving.is_set():
            self._on_death(self._why(rank, code))

    def _why(self, rank: int, code: int) -> Failed:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        try:
            told = decode(_last_words(self.rendezvous, rank).read_bytes())
        except (OSError, ProtocolError):
            return Failed("RankDied", f"rank {rank} of the trainer ended ({how})", "")
        assert isinstance(told, Failed)
        return Failed(told.error, f"rank {rank}: {told.message}", told.traceback)


@dataclass(frozen=True)
class _Child:
    process: subprocess.Popen[bytes]
    leash: int  # our write end; it closes when we die, however that happens


def _start(rank: int, size: int, rendezvous: Path) -> _Child:
    read_end, write_end = os.pipe()
    place = ["--rank", str(rank), "--size", str(size), "--rendezvous", str(rendezvous)]
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "workers.trainer", "--leash-fd", str(read_end), *place],
            stdin=subprocess.DEVNULL,
            pass_fds=(read_end,),
        )
    finally:
        os.close(read_end)
    return _Child(process, write_end)


def tell(rendezvous: Path, rank: int, failed: Failed) -> None:
    """A rank's last words, where rank 0 finds them."""
    path = _last_words(rendezvous, rank)
    path.with_suffix(".tmp").write_bytes(encode(failed))
    path.with_suffix(".tmp").rename(path)


def _last_words(rendezvous: Path, rank: int) -> Path:
    return rendezvous.with_name(f"rank-{rank}.failed")


def visible_device(environment: Mapping[str, str], rank: int) -> str:
    """`CUDA_VISIBLE_DEVICES` for one rank: its own GPU of those that the operator left visible, and no other.

    Also for a lone process: transformers wraps a model in `DataParallel` wherever it sees more than one GPU.
    """
    allowed = environment.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return str(rank)
    devices = [device.strip() for device in allowed.split(",") if device.strip()]
    return devices[rank] if rank < len(devices) else ""
