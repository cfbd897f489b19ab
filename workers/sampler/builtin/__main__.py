"""Command line of the built-in sampler.

Does not cover: restarting it, which is the keeper's work.
"""

import argparse
import ctypes
import os
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m workers.sampler.builtin", description="built-in sampler")
    parser.add_argument("--model", type=Path, required=True, help="directory of a transformers causal model")
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-loras", type=int, default=4, help="adapter versions that may be live at once")
    parser.add_argument("--max-lora-rank", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kv-gib", type=float, default=2.0, help="memory for cached and running text, half each")
    args = parser.parse_args()
    # Before torch loads libgomp: a thread that waits sleeps soon, so an idle engine takes nothing from the trainer.
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    _keep_the_heap_small()
    _keep_few_kernels()
    from workers.sampler.builtin import server

    return server.serve(args)


def _keep_the_heap_small() -> None:
    """Tell glibc to give big blocks back: by default every thread that merges or decodes hoards what it once used."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # malloc.h
        mallopt(arena_max, 2)
        mallopt(mmap_threshold, 8 << 20)
        mallopt(trim_threshold, 256 << 20)


def _keep_few_kernels() -> None:
    """Both libraries keep compiled kernels by shape, 1,024 each: 0.3 GiB that looks like a leak."""
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's, and PyTorch's in front of it
        # Five linear layers of different shapes times the sizes of `lane.bucket` are 200.
        os.environ.setdefault(cache, "256")


if __name__ == "__main__":
    sys.exit(main())
