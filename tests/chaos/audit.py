"""Triggers that write down, in the database itself, what no writer of the service may do, and what was registered.

Does not cover: what follows from the log (`checker`). A trigger sees a row and not its writer, so a supervisor of the
storm tells each of its connections which attempt it is: SQLite asks the function `chaos_attempt()`, PostgreSQL the
parameter `chaos.attempt`. A write that was rolled back leaves nothing here: only accepted ones count.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, event, text

from app.db import engine as databases
from workers import heartbeat

LOG = "chaos_log"
COLUMNS = "kind, table_name, job_id, step, writer, current, detail"

# kind: what it says of a write. The first five must never be seen.
STALE = "stale"  # by an attempt that no longer owns the job
BACKWARDS = "backwards"  # `attempt` fell
STOLEN = "stolen"  # a job left an owner whose lease was alive, by no order of a client
REOPENED = "reopened"  # out of a terminal status
REWRITTEN = "rewritten"  # a registered checkpoint's row changed
REGISTERED = "registered"  # a snapshot (step) or a checkpoint; `detail` is its digest
MOVED = "moved"  # from one status to another
FORBIDDEN = (STALE, BACKWARDS, STOLEN, REOPENED, REWRITTEN)

_TERMINAL = "('succeeded', 'failed', 'cancelled')"
_PARTED = "(NEW.status <> OLD.status OR NEW.attempt <> OLD.attempt)"


@dataclass(frozen=True)
class Rule:
    """Log `kind` after `operation` on `table` if `condition`; `CURRENT` is the job's attempt, `ME` the writer's."""

    table: str
    operation: str
    kind: str
    condition: str
    step: str = "NULL"
    detail: str = "NULL"


RULES = (
    Rule(
        "jobs", "UPDATE", STALE, "ME < OLD.attempt OR (ME IS NOT NULL AND OLD.status <> 'running')", detail="OLD.status"
    ),
    Rule("jobs", "UPDATE", BACKWARDS, "NEW.attempt < OLD.attempt", detail="OLD.attempt"),
    Rule(
        "jobs",
        "UPDATE",
        STOLEN,
        f"OLD.status = 'running' AND ME IS NULL AND OLD.lease_until > NOW AND {_PARTED}"
        " AND NEW.status NOT IN ('cancelled', 'paused')",
        detail="NEW.status",
    ),
    Rule("jobs", "UPDATE", REOPENED, f"OLD.status IN {_TERMINAL} AND {_PARTED}", detail="OLD.status"),
    Rule("jobs", "UPDATE", MOVED, "NEW.status <> OLD.status", step="NEW.step", detail="NEW.status"),
    Rule("snapshots", "INSERT", STALE, "ME < CURRENT OR NEW.attempt <> CURRENT", "NEW.step"),
    Rule("snapshots", "INSERT", REGISTERED, "TRUE", "NEW.step", "NEW.sha256"),
    Rule("checkpoints", "INSERT", STALE, "ME < CURRENT OR NEW.attempt <> CURRENT", "NEW.step"),
    Rule("checkpoints", "INSERT", REGISTERED, "TRUE", "NEW.step", "NEW.sha256"),
    Rule("checkpoints", "UPDATE", REWRITTEN, "TRUE", "NEW.step", "NEW.sha256"),
    Rule("events", "INSERT", STALE, "ME < CURRENT", detail="NEW.message"),
    Rule("rollouts", "INSERT", STALE, "ME < CURRENT OR NEW.attempt <> CURRENT", "NEW.step"),
    Rule("rollouts", "UPDATE", STALE, "ME < CURRENT", "NEW.step", "NEW.state"),
)


def install(engine: Engine) -> None:
    """Into a migrated database."""
    sqlite = engine.dialect.name == "sqlite"
    number = "INTEGER PRIMARY KEY AUTOINCREMENT" if sqlite else "BIGSERIAL PRIMARY KEY"
    with engine.begin() as connection:
        connection.execute(
            text(
                f"CREATE TABLE {LOG} (seq {number}, kind TEXT NOT NULL, table_name TEXT NOT NULL, "
                "job_id TEXT NOT NULL, step INTEGER, writer INTEGER, current INTEGER, detail TEXT)"
            )
        )
        connection.execute(text("CREATE TABLE chaos_started (job_id TEXT PRIMARY KEY, rollouts INTEGER NOT NULL)"))
        for statement in (_sqlite if sqlite else _postgresql)():
            connection.execute(text(statement))


def _statements(rule: Rule, me: str, moment: str) -> tuple[str, str]:
    """Condition and INSERT of one rule."""
    job = "NEW.id" if rule.table == "jobs" else "NEW.job_id"
    current = "OLD.attempt" if rule.table == "jobs" else f"(SELECT attempt FROM jobs WHERE id = {job})"
    spelled = rule.condition
    for word, meaning in (("CURRENT", current), ("ME", me), ("NOW", moment)):
        spelled = re.sub(rf"\b{word}\b", meaning, spelled)
    values = f"'{rule.kind}', '{rule.table}', {job}, {rule.step}, {me}, {current}, CAST({rule.detail} AS TEXT)"
    return spelled, f"INSERT INTO {LOG} ({COLUMNS}) VALUES ({values})"


_COUNT = (
    "INSERT INTO chaos_started (job_id, rollouts) VALUES (NEW.job_id, 1) "
    "ON CONFLICT (job_id) DO UPDATE SET rollouts = chaos_started.rollouts + 1"
)


def _sqlite() -> list[str]:
    made = [f"CREATE TRIGGER chaos_started_rollouts AFTER INSERT ON rollouts BEGIN {_COUNT}; END"]
    for number, rule in enumerate(RULES):
        moment = "((julianday('now') - 2440587.5) * 86400.0)"
        condition, insert = _statements(rule, "chaos_attempt()", moment)
        name = f"chaos_{number}_{rule.kind}"
        made.append(
            f"CREATE TRIGGER {name} AFTER {rule.operation} ON {rule.table} WHEN {condition} BEGIN {insert}; END"
        )
    return made


def _postgresql() -> list[str]:
    made = []
    for table, operation in sorted({(rule.table, rule.operation) for rule in RULES}):
        body = [_COUNT + ";"] if (table, operation) == ("rollouts", "INSERT") else []
        for rule in RULES:
            if (rule.table, rule.operation) == (table, operation):
                condition, insert = _statements(rule, "me", "extract(epoch FROM clock_timestamp())")
                body.append(f"IF {condition} THEN {insert}; END IF;")
        name = f"chaos_{table}_{operation.lower()}"
        made.append(
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ "
            "DECLARE me integer := nullif(current_setting('chaos.attempt', true), '')::integer; "
            f"BEGIN {' '.join(body)} RETURN NULL; END $$"
        )
        made.append(f"CREATE TRIGGER {name} AFTER {operation} ON {table} FOR EACH ROW EXECUTE FUNCTION {name}()")
    return made


class Identity:
    """Who writes in this process: the attempt of its supervisor, nobody in all others."""

    def __init__(self) -> None:
        self.attempt: int | None = None

    def show_on(self, engine: Engine) -> None:
        """On every connection of `engine`; where the triggers are, no other engine can write."""
        if engine.dialect.name == "sqlite":

            @event.listens_for(engine, "connect")
            def _on_connect(connection: Any, record: Any) -> None:
                connection.create_function("chaos_attempt", 0, lambda: self.attempt)

        else:

            @event.listens_for(engine, "begin")
            def _on_begin(connection: Any) -> None:
                if self.attempt is not None:
                    connection.exec_driver_sql(f"SELECT set_config('chaos.attempt', '{self.attempt}', true)")

    def adopt(self) -> None:
        """All engines that this process will make."""
        make_async, make_sync = databases.create_async, databases.create_sync

        def create_async(url: str) -> Any:
            made = make_async(url)
            self.show_on(made.sync_engine)
            return made

        def create_sync(url: str) -> Engine:
            made = make_sync(url)
            self.show_on(made)
            return made

        databases.create_async = create_async
        databases.create_sync = heartbeat.create_sync = create_sync  # type: ignore[attr-defined]
