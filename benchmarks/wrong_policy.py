"""Which gate catches which wrong policy: one table for an engine, a precision of sampler and one of trainer.

Does not cover: speed (the time of a publication is in `bench_publish`). Without --model a small random Llama is made.

    python benchmarks/wrong_policy.py --engine builtin --sampler bfloat16 --trainer float32 [--model DIR]

vLLM is started with the interpreter that HONE_TEST_VLLM_PYTHON names.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from app.core.settings import Settings
from app.db import migrate
from app.db.engine import Database
from tests.contract.proof.engines import serving, write_model
from tests.contract.proof.injection import Bench, show

DTYPES = ("float32", "bfloat16")


async def measure(arguments: argparse.Namespace, scratch: Path) -> None:
    model = arguments.model or write_model(scratch / "model")
    settings = Settings(data_dir=scratch / "data")
    settings.root.mkdir(parents=True)
    migrate.upgrade(settings.database)
    database = Database(settings.database)
    try:
        with serving(arguments.engine, arguments.sampler, model, scratch) as url:
            bench = Bench(settings, database, url, model, arguments.sampler, arguments.trainer)
            await bench.register()
            rows = await bench.table("wrong")
    finally:
        await database.close()
    show(f"{arguments.engine} in {arguments.sampler}, trainer in {arguments.trainer}", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("builtin", "vllm"), default="builtin")
    parser.add_argument("--sampler", choices=DTYPES, default="float32")
    parser.add_argument("--trainer", choices=DTYPES, default="float32")
    parser.add_argument("--model", type=Path, help="directory of a base model; must have the catalogue's LoRA targets")
    logging.disable(logging.ERROR)  # each fault is logged as the alarm that it would be
    with tempfile.TemporaryDirectory(prefix="wrong-policy-") as scratch:
        asyncio.run(measure(parser.parse_args(), Path(scratch)))


if __name__ == "__main__":
    main()
