from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest

from app.core import logging as hone_logging
from app.core.logging import bound

log = logging.getLogger("hone.test")


class Written:
    """What went to stderr so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys, self._text = capsys, ""

    def text(self) -> str:
        self._text += self._capsys.readouterr().err
        return self._text


@pytest.fixture
def stream(capsys: pytest.CaptureFixture[str]) -> Iterator[Written]:
    """The root logger and the hooks are put back afterwards."""
    root = logging.getLogger()
    before, level, hook = root.handlers[:], root.level, sys.excepthook
    root.handlers.clear()  # `configure` closes those that it finds
    yield Written(capsys)
    root.handlers[:] = before
    root.setLevel(level)
    logging.captureWarnings(False)
    sys.excepthook = hook


def lines(stream: Written) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.text().splitlines()]


def test_a_json_line_carries_what_is_bound_and_what_the_call_adds(stream: Written) -> None:
    hone_logging.configure("json")
    with bound(job_id="ftjob-1", attempt=2), bound(trace_id="trace-1"):
        log.warning("tool %s failed", "search", extra={"ctx": {"status": 503}})
    (line,) = lines(stream)
    assert line.pop("time")
    assert line == {
        "level": "warning", "logger": "hone.test", "message": "tool search failed",
        "job_id": "ftjob-1", "attempt": 2, "trace_id": "trace-1", "status": 503,
    }  # fmt: skip


def test_a_traceback_stays_on_its_line(stream: Written) -> None:
    hone_logging.configure("json")
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        log.exception("it broke")
    (line,) = lines(stream)
    assert "ValueError: first\nsecond" in str(line["exception"])


def test_a_warning_and_the_exception_that_ends_a_process_are_lines_too(stream: Written) -> None:
    hone_logging.configure("json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old\nways", DeprecationWarning, stacklevel=1)
    error = ValueError("gone")
    sys.excepthook(ValueError, error, None)
    warned, ended = lines(stream)
    assert (warned["level"], "old\nways" in str(warned["message"])) == ("warning", True)
    assert (ended["level"], ended["exception"]) == ("critical", "ValueError: gone")


def test_a_field_cannot_replace_the_message(stream: Written) -> None:
    hone_logging.configure("json")
    log.info("true", extra={"ctx": {"message": "false", "level": "none"}})
    assert (lines(stream)[0]["message"], lines(stream)[0]["level"]) == ("true", "info")


def test_text_names_the_fields_before_the_traceback(stream: Written) -> None:
    hone_logging.configure("text")
    try:
        raise ValueError("no")
    except ValueError:
        with bound(job_id="ftjob-1"):
            log.exception("it broke")
    first, *rest = stream.text().splitlines()
    assert first.endswith("ERROR   hone.test: it broke job_id=ftjob-1")
    assert rest[-1] == "ValueError: no"


async def test_tasks_side_by_side_keep_their_own_fields(stream: Written) -> None:
    hone_logging.configure("json")

    async def one(trace_id: str) -> None:
        with bound(trace_id=trace_id):
            await asyncio.sleep(0)
            log.info(trace_id)

    with bound(job_id="ftjob-1"):
        await asyncio.gather(one("a"), one("b"))
    log.info("after")
    assert [(line.get("trace_id"), line.get("job_id")) for line in lines(stream)] == [
        ("a", "ftjob-1"), ("b", "ftjob-1"), (None, None),
    ]  # fmt: skip


def test_a_thread_in_a_copied_context_names_the_job(stream: Written) -> None:
    hone_logging.configure("json")
    with bound(job_id="ftjob-1"):
        thread = threading.Thread(target=contextvars.copy_context().run, args=(log.info, "beat"))
    thread.start()
    thread.join()
    assert lines(stream)[0]["job_id"] == "ftjob-1"
