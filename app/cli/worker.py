"""`hone worker`: on a GPU host, a Celery worker for each set of GPUs, and a janitor beside them.

Does not cover: the samplers of the host (`hone sampler`) and the API.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from app.cli.children import JANITOR, slot
from app.cli.failure import USAGE, CommandFailed
from app.cli.migrated import await_migration
from app.cli.together import run_together
from app.jobs.doorbell import BadQueues, NoCelery, make_doorbell

if TYPE_CHECKING:
    from app.core.settings import Settings


def run(settings: Settings, queue: str, gpus: Sequence[str]) -> int:
    """`gpus`: one "0,1" for each slot; none: one slot with all that is visible. Blocks. Raises CommandFailed."""
    if settings.redis_url is None:
        raise CommandFailed(
            "HONE_REDIS_URL is not set: nobody could ring these workers",
            fix="set it to the Redis of the API (redis://host:6379/0); on a single machine use `hone up`",
            code=USAGE,
        )
    sets = [_indices(named) for named in gpus]
    every = [index for some in sets for index in some]
    if len(set(every)) < len(every):
        raise CommandFailed("--gpus: one GPU is in two sets", fix="give each GPU to one slot", code=USAGE)
    try:
        make_doorbell(settings).close()
    except (BadQueues, NoCelery) as error:
        raise CommandFailed(str(error), code=USAGE) from None
    await_migration(settings)
    slots = [slot(number, queue, named) for number, named in enumerate(gpus or [None])]
    return run_together(settings, [JANITOR, *slots])


def _indices(named: str) -> list[int]:
    parts = named.split(",")
    if not all(part.isdecimal() for part in parts):
        raise CommandFailed(f"--gpus {named!r}: expected numbers of GPUs, such as 0,1", code=USAGE)
    return [int(part) for part in parts]
