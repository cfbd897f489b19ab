"""`python -m workers.trainer --in-fd R --out-fd W`: the trainer process.

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

from workers.messages import Failed, Progress, ProtocolError, Start
from workers.trainer.pipe import Pipe

TRACEBACK_CHARS = 8000
# glibc: serve tensors up to 32 MB from the heap and keep it. By default each goes through mmap and its pages are
# zeroed by the kernel anew, which costs as much as the elementwise work on them.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_ALLOCATION = 32 * 2**20


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m workers.trainer")
    parser.add_argument("--in-fd", type=int, required=True)
    parser.add_argument("--out-fd", type=int, required=True)
    arguments = parser.parse_args()
    pipe = Pipe(arguments.in_fd, arguments.out_fd)
    try:
        start = pipe.receive()
        if not isinstance(start, Start):
            raise ProtocolError(f"expected Start, got {type(start).__name__}")
        _prepare_process()
        pipe.send(Progress("load", 0, 3))
        from workers.trainer.session import Session  # seconds of imports: only now that the pipe is watched

        Session(start, pipe, time.monotonic, began).run()
    except BaseException as error:
        traceback.print_exc()
        text = "".join(traceback.format_exception(error))
        pipe.send(Failed(_kind(error), str(error)[:2000], text[-TRACEBACK_CHARS:]))
        return 1
    return 0


def _prepare_process() -> None:
    """Before any import that reads them: no telemetry, no hub, no tokenizer threads."""
    os.environ.update(
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
    )
    # Threads that wait for each other must sleep: spinning takes the core that the other one needs. On two cores with
    # other processes busy an update took 18–26 s spinning and 5–8 s sleeping; alone there is no difference in CPU time.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    keep_memory()


def keep_memory() -> None:
    """Let malloc keep what is freed: an update allocates the same tensors layer after layer."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_ALLOCATION)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _kind(error: BaseException) -> str:
    """The class name, except that running out of memory is called that whichever library says it."""
    text = f"{type(error).__name__}: {error}".lower()
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "OutOfMemory"
    return type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
