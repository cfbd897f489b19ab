"""What an engine on PostgreSQL is given: deadlines for every wait, and text that this database can keep.

Does not cover: choosing the driver and transactions (`app.db.engine`). Imported only where psycopg is installed.
"""

from __future__ import annotations

import json
import math
from typing import Any

from psycopg.types.string import StrDumper
from sqlalchemy import Engine, event
from sqlalchemy.pool import ConnectionPoolEntry

LOCK_TIMEOUT_S = 10  # as long as SQLite's writers wait for each other

# A worker that is frozen, or whose host is gone, inside a transaction must not keep the lock on its job's row: the
# reconciler skips locked rows. libpq's own limits cover a server that is gone (tests/db/test_postgres.py).
DEADLINES: dict[str, Any] = {
    "connect_timeout": LOCK_TIMEOUT_S,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    "options": f"-c lock_timeout={LOCK_TIMEOUT_S}s -c idle_in_transaction_session_timeout=20s",
}


def keepable(text: str) -> str:
    """`text` with U+FFFD for what PostgreSQL refuses: NUL and halves of surrogate pairs.

    A tool's answer or a model may spell both, and they reach messages of errors: not worth a job.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("\x00", "\ufffd")


def keepable_json(value: Any) -> str:
    """JSON of `value`, with null for NaN and infinities: a metric may be one, and the type `json` refuses them.

    It would store the escapes of the characters above, and then fail every query that looks inside.
    """
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_cleaned(value))
    return json.dumps(_cleaned(value)) if "\\u0000" in text or "\\ud" in text else text


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return keepable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(each) for key, each in value.items()}
    return [_cleaned(each) for each in value] if isinstance(value, list | tuple) else value


OPTIONS: dict[str, Any] = {"pool_pre_ping": True, "connect_args": DEADLINES, "json_serializer": keepable_json}


class KeepableDumper(StrDumper):
    def dump(self, obj: str) -> Any:
        return super().dump(keepable(obj))


def prepare(engine: Engine) -> None:
    """To be called once, before the first connection."""

    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, record: ConnectionPoolEntry) -> None:
        driver: Any = record.driver_connection
        driver.adapters.register_dumper(str, KeepableDumper)
