from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from app.cli import alive
from app.core.settings import Settings
from app.db import migrate
from app.db.engine import create_sync
from app.db.tables import Worker


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = Settings(data_dir=tmp_path)
    migrate.upgrade(made.database)
    return made


def beat(settings: Settings, kind: str, host: str, age_s: float) -> None:
    then = time.time() - age_s
    engine = create_sync(settings.database)
    with Session(engine) as session, session.begin():
        session.add(
            Worker(
                id=f"{kind}-{host}",
                project_id="p",
                kind=kind,
                host=host,
                place="",
                pid=1,
                process_group=1,
                process_started=0,
                started_at=then,
                heartbeat=then,
            )
        )
    engine.dispose()


def test_a_runner_that_beats_is_alive(settings: Settings) -> None:
    beat(settings, "runner", settings.hostname, 1)
    assert alive.process(settings, "runner") is None


def test_another_host_and_another_kind_do_not_count(settings: Settings) -> None:
    beat(settings, "runner", "elsewhere", 1)
    beat(settings, "keeper", settings.hostname, 1)
    assert alive.process(settings, "runner") == f"no runner has started on {settings.hostname}"


def test_a_silent_runner_is_not_alive(settings: Settings) -> None:
    beat(settings, "runner", settings.hostname, 100)
    assert "silent for 10" in (alive.process(settings, "runner") or "")


def test_a_database_that_is_away_is_said(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "never migrated")
    settings.root.mkdir()
    assert "database does not answer" in (alive.process(settings, "runner") or "")


@pytest.fixture
def answering() -> Iterator[tuple[int, list[int]]]:
    """A port, and the status it answers /readyz with."""
    status = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0])
            self.end_headers()
            self.wfile.write(b"storage: cannot be written" if self.path == "/readyz" else b"wrong path")

        def log_message(self, format: str, *args: object) -> None:
            return None

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port, status
        server.shutdown()
        thread.join()


def test_the_api_is_alive_while_it_takes_requests(answering: tuple[int, list[int]]) -> None:
    port, status = answering
    assert alive.api(Settings(port=port)) is None
    status[0] = 503
    assert alive.api(Settings(port=port)) == "storage: cannot be written"


def test_an_api_that_does_not_listen_is_not_alive() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert "does not answer" in (alive.api(Settings(port=port)) or "")
