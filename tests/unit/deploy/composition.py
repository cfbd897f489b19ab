"""`docker-compose.yml` as data, for the tests of this folder.

Does not cover: interpolation and profiles, which are Compose's.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[3]
FILE = ROOT / "docker-compose.yml"
COMPOSITION: dict[str, Any] = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, Any] = COMPOSITION["services"]
OURS = sorted(name for name, service in SERVICES.items() if "build" in service)


def tool(name: str) -> str | None:
    """A linter beside this Python or on the path; None: it is not installed."""
    return shutil.which(name, path=os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])))
