"""`python -m workers.trainer --in-fd R --out-fd W`: the trainer process; `--leash-fd L --rank …`: one more rank of it.

Does not cover: the work itself (`workers.trainer.session`). Standard output and error are logs only.

The pipe is listened to before torch is imported, so a supervisor that dies during the import still ends this process.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
import traceback
from pathlib import Path

from workers.leash import kill_own_group, watch
from workers.messages import Failed, Progress, ProtocolError, Start
from workers.trainer import ranks
from workers.trainer.pipe import Pipe

TRACEBACK_CHARS = 8000
STOP_GRACE_S = 10.0
# glibc: serve tensors up to 32 MB from the heap and keep it. By default each goes through mmap and its pages are
# zeroed by the kernel anew, which costs as much as the elementwise work on them.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_ALLOCATION = 32 * 2**20


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m workers.trainer")
    parser.add_argument("--in-fd", type=int)
    parser.add_argument("--out-fd", type=int)
    parser.add_argument("--leash-fd", type=int)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--rendezvous", type=Path)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        return follow(arguments.leash_fd, arguments.rank, arguments.size, arguments.rendezvous)
    return lead(Pipe(arguments.in_fd, arguments.out_fd), began)


def lead(pipe: Pipe, began: float) -> int:
    """Rank 0: the only one with a pipe."""
    others: ranks.Ranks | None = None
    try:
        start = pipe.receive()
        if not isinstance(start, Start):
            raise ProtocolError(f"expected Start, got {type(start).__name__}")
        if start.processes > 1:
            others = ranks.Ranks(start.processes, lambda failed: _end_group(pipe, failed))
        prepare_process(0)
        pipe.send(Progress("load", 0, 3))
        from workers.trainer.session import Session  # seconds of imports: only now that the pipe is watched
        from workers.trainer.world import LeaderChannel, World

        world = World.join(0, start.processes, others.rendezvous if others else Path())
        world.share(start)
        Session(start, LeaderChannel(pipe, world), time.monotonic, began, world).run()
        world.leave()
    except BaseException as error:
        traceback.print_exc()
        failed = others.failure(wait_s=1.0) if others else None
        pipe.send(failed or _failed(error))
        if others:
            others.leave(grace_s=0.0)
        return 1
    if others:
        others.leave(STOP_GRACE_S)
    return 0


def follow(leash_fd: int, rank: int, size: int, rendezvous: Path) -> int:
    """Any other rank: hears what rank 0 hears, and kills the group when rank 0 is gone."""
    watch(leash_fd, kill_own_group)
    try:
        prepare_process(rank)
        from workers.trainer.session import Session
        from workers.trainer.world import FollowerChannel, World

        world = World.join(rank, size, rendezvous)
        start: Start = world.share(None)
        Session(start, FollowerChannel(world), world=world).run()
        world.leave()
    except BaseException as error:
        traceback.print_exc()
        ranks.tell(rendezvous, rank, _failed(error))
        return 1
    return 0


def _end_group(pipe: Pipe, failed: Failed) -> None:
    """A rank is gone: the update cannot end any more."""
    pipe.send(failed)
    kill_own_group()


def prepare_process(rank: int) -> None:
    """Before any import that reads them: no telemetry, no hub, no tokenizer threads, one GPU, no foreign launcher."""
    os.environ.update(
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        CUDA_VISIBLE_DEVICES=ranks.visible_device(os.environ, rank),
    )
    # Threads that wait for each other must sleep: spinning takes the core that the other one needs. On two cores with
    # other processes busy an update took 18–26 s spinning and 5–8 s sleeping; alone there is no difference in CPU time.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)  # left over from a launcher around the worker: accelerate would wait for its peers
    keep_memory()


def keep_memory() -> None:
    """Let malloc keep what is freed: an update allocates the same tensors layer after layer."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_ALLOCATION)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _failed(error: BaseException) -> Failed:
    text = "".join(traceback.format_exception(error))
    return Failed(_kind(error), str(error)[:2000], text[-TRACEBACK_CHARS:])


def _kind(error: BaseException) -> str:
    """The class name, except that running out of memory is called that whichever library says it."""
    text = f"{type(error).__name__}: {error}".lower()
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "OutOfMemory"
    return type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
