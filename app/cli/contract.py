"""`hone openapi`: the API's contract as text, the same on every machine.

Does not cover: what is in it; every slice describes its own operations.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

from app.cli.failure import CommandFailed


def header() -> str:
    """Says what made the file: another version of these two may word a schema differently."""
    return f"# Made by `make openapi` with fastapi {version('fastapi')}, pydantic {version('pydantic')}; do not edit.\n"


def document() -> str:
    """YAML, in the order of the code."""
    try:
        import yaml
    except ImportError:
        raise CommandFailed("PyYAML is not installed", fix="pip install pyyaml") from None
    from app.core.settings import Settings
    from app.web.main import create_app

    with tempfile.TemporaryDirectory(prefix="hone-openapi-") as scratch:
        app = create_app(Settings(data_dir=Path(scratch), database_url=f"sqlite+aiosqlite:///{scratch}/none.db"))
        contract = app.openapi()
    body: str = yaml.safe_dump(contract, sort_keys=False, allow_unicode=True, width=120)
    return header() + body
