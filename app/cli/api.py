"""`hone api`: migrate, then serve the API alone, as a container or a service manager wants it.

Does not cover: running jobs (`hone worker`) and samplers (`hone sampler`); `hone up` does all three on one machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import uvicorn

from app.cli.failure import FAILED
from app.cli.installation import prepare_database
from app.cli.up import listen, server_config
from app.core import logging as hone_logging

if TYPE_CHECKING:
    from app.core.settings import Settings


def run(settings: Settings) -> int:
    """Blocks until SIGINT or SIGTERM, then answers what is in flight. The exit code; raises CommandFailed."""
    with listen(settings) as listener:
        prepare_database(settings)
        hone_logging.configure(settings.log_format)
        server = uvicorn.Server(server_config(settings))
        server.run(sockets=[listener])
    return 0 if server.started else FAILED
