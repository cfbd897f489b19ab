"""Print the bridge table: `python -m tests.contract.rendering`."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from tests.contract.rendering.families import CONTROL, NOT_COVERED
from tests.contract.rendering.transcript import table


async def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        async for line in table(Path(directory), list(CONTROL)):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
    for family, why in NOT_COVERED.items():
        sys.stdout.write(f"{family:<18}not covered: {why}\n")


asyncio.run(main())
