"""`hone sampler`: the keeper, which runs the samplers of this host.

Does not cover: jobs (`hone worker`) and the API.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.cli.children import KEEPER
from app.cli.migrated import await_migration
from app.cli.together import run_together

if TYPE_CHECKING:
    from app.core.settings import Settings


def run(settings: Settings) -> int:
    """Blocks. The exit code; raises CommandFailed."""
    await_migration(settings)
    return run_together(settings, [KEEPER])
