"""`python -m tests.chaos --database sqlite --jobs 60 --faults 300 --seed 1`: one storm, one line of figures.

Ends with 1 when anything that must hold did not, and with `--mutation` when the checker did not see what is missing.
Does not cover: the series that `make chaos` runs.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import shutil
import sys
from pathlib import Path
from tempfile import mkdtemp

from tests.chaos import real
from tests.chaos.faulty import MUTATIONS
from tests.chaos.mutations import TELLTALES, mutated
from tests.chaos.storm import Plan, storm


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--jobs", type=int, default=60, help="at least; a storm makes more if its faults outlast them")
    parser.add_argument("--faults", type=int, default=300, help="at least")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mutation", choices=MUTATIONS, help="take away what the design rests on")
    parser.add_argument("--real", action="store_true", help="the real trainer and the built-in engine")
    parser.add_argument("--root", type=Path, help="an empty folder to work in, which stays; default: a temporary one")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    root: Path = options.root or Path(mkdtemp(prefix="hone-chaos-"))
    root.mkdir(parents=True, exist_ok=True)
    plan = Plan(options.database, options.jobs, options.faults, options.seed)
    if options.mutation:
        plan = mutated(plan, options.mutation)
    if options.real:
        plan = real.planned(plan, root)
    outcome = asyncio.run(storm(plan, root))
    print(outcome.line(), flush=True)  # noqa: T201
    for fault in [*outcome.verdict.faults, *outcome.orphans]:
        print(f"  {fault}", file=sys.stderr)  # noqa: T201
    if options.root is None and (outcome.green or options.mutation):
        shutil.rmtree(root, ignore_errors=True)
    else:
        print(f"  logs: {root}/logs, {root}/data/logs", file=sys.stderr)  # noqa: T201
    if options.mutation:
        return int(not any(outcome.verdict.figures[name] for name in TELLTALES[options.mutation]))
    return int(not outcome.green)


if __name__ == "__main__":
    sys.exit(main())
