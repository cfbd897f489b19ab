"""Keep several children until SIGINT or SIGTERM: asked once they end in order, asked twice at once.

Does not cover: `hone up`, which serves the API beside its children.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from app.cli.children import Role, Stop, keep

if TYPE_CHECKING:
    from app.core.settings import Settings


def run_together(settings: Settings, roles: Sequence[Role]) -> int:
    """Blocks. The exit code."""
    asyncio.run(_keep_all(settings, roles))
    return 0


async def _keep_all(settings: Settings, roles: Sequence[Role]) -> None:
    stop = Stop()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.ask)
    # By host: the data directory may be on a disk that several hosts share.
    environment, logs = settings.environment(), settings.logs_dir / settings.hostname
    async with asyncio.TaskGroup() as group:
        for role in roles:
            say(f"keeping the {role.name} (log: {logs / f'{role.name}.log'})")
            group.create_task(keep(role, environment=environment, logs=logs, say=say, stop=stop))


def say(line: str) -> None:
    sys.stderr.write(f"hone: {line}\n")
    sys.stderr.flush()
