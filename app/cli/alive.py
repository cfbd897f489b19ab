"""`python -m app.cli.alive api|runner|keeper`: a container's health check; exit code 0: alive, 1: not, and says why.

Does not cover: the whole service (`hone doctor`). A runner or keeper has no port: its row tells, if it beats.
"""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.request

from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from app.core.settings import Settings
from app.db.engine import create_sync, now
from app.db.tables import Worker

TIMEOUT_S = 3.0
SILENT_AFTER_S = 30.0


def api(settings: Settings) -> str | None:
    """What keeps the API of this container from taking requests; None: nothing."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://127.0.0.1:{settings.port}/readyz", timeout=TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode("utf-8", "replace")
    except OSError as error:
        return f"port {settings.port} does not answer ({error})"


def process(settings: Settings, kind: str) -> str | None:
    """What is wrong with the `kind` of this host; None: nothing."""
    latest = select(now() - func.max(Worker.heartbeat)).where(Worker.kind == kind, Worker.host == settings.hostname)
    engine = create_sync(settings.database)
    try:
        with engine.connect() as connection:
            silence = connection.scalar(latest)
    except SQLAlchemyError as error:
        return f"the database does not answer ({type(error).__name__})"
    finally:
        engine.dispose()
    if silence is None:
        return f"no {kind} has started on {settings.hostname}"
    return f"the {kind} is silent for {silence:.0f} s" if silence > SILENT_AFTER_S else None


def main() -> int:
    parser = argparse.ArgumentParser(prog="app.cli.alive")
    parser.add_argument("what", choices=("api", "runner", "keeper"))
    what = parser.parse_args().what
    settings = Settings()
    problem = api(settings) if what == "api" else process(settings, what)
    if problem is not None:
        sys.stderr.write(f"{problem}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
