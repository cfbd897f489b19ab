"""One log line format for every process: time, level, logger, message, then key=value pairs of `extra={"ctx": {...}}`.

Does not cover: what users see (events, errors). Secrets never reach a logger: they are `SecretStr` or sealed.
"""

from __future__ import annotations

import logging
import sys
from typing import Any


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        ctx: dict[str, Any] = getattr(record, "ctx", {})
        return line + "".join(f" {key}={value}" for key, value in ctx.items()) if ctx else line


def configure(level: int = logging.INFO) -> None:
    """Log to stderr; called once by each process's entry point."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("httpcore").setLevel(logging.WARNING)
