"""One log format for every process: readable text, or a JSON object a line for a collector (`HONE_LOG_FORMAT`).

Does not cover: what users see (events, errors). Secrets never reach a logger: they are `SecretStr` or sealed.

A line carries the fields of `extra={"ctx": {...}}` and those that are bound where it is written (`request_id`,
`job_id`, `attempt`, `trace_id`). Bindings follow tasks, not threads: a thread that logs runs in a copied context.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

Format = Literal["text", "json"]

_bound: ContextVar[Mapping[str, Any]] = ContextVar("hone_log_fields")


@contextmanager
def bound(**fields: Any) -> Iterator[None]:
    """Every line written inside, also by tasks started there, carries these fields beside those already bound."""
    token = _bound.set({**_bound.get({}), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


class _Fields(logging.Filter):
    """Takes down what is bound while the line is written: a handler may format it elsewhere."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.fields = {**_bound.get({}), **getattr(record, "ctx", {})}
        return True


class Text(logging.Formatter):
    """Time, level, logger, message, then key=value pairs."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        return super().formatMessage(record) + "".join(f" {key}={value}" for key, value in fields.items())


class Json(logging.Formatter):
    """`time`, `level`, `logger`, `message`, the fields, and `exception` with its traceback; one line each."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = dict(getattr(record, "fields", {}))
        line |= {  # ours win over a field of the same name
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _ended_by(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """The interpreter would print it as lines of its own, which a collector of JSON cannot read."""
    if isinstance(error, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
    else:
        logging.getLogger("hone").critical("ended by an exception", exc_info=(kind, error, traceback))


def configure(format: Format, level: int = logging.INFO) -> None:
    """Log to stderr, warnings and the exception that ends a process too; called once by its entry point."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_Fields())
    handler.setFormatter(Json() if format == "json" else Text())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = _ended_by
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("httpcore").setLevel(logging.WARNING)
