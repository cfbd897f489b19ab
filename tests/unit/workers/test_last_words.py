"""The one line of a log that says why a sampler ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.sampler.last_words import last_words, size

PORT = """(APIServer pid=7) INFO 11-20 10:47:48 [api_utils.py:286] non-default args: {'port': 1}
(APIServer pid=7) Traceback (most recent call last):
(APIServer pid=7)   File "x.py", line 1, in <module>
(APIServer pid=7) OSError: [Errno 98] Address already in use
nanobind: leaked 64 types!
 - leaked type "triton._C.libtriton.ir.location"
See https://nanobind.readthedocs.io/en/latest/refleaks.html/multiprocessing/resource_tracker.py:254: UserWarning: x
  warnings.warn('resource_tracker: There appear to be %d '
"""
MEMORY = """(EngineCore pid=9) ERROR 11-20 10:49:52 [core.py:1512] ValueError: Free memory on device cuda:0 (3/80) \
on startup is less than desired GPU memory utilization
(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
SHAPE = """(Worker pid=9) ERROR 11-20 10:49:52 [multiproc_executor.py:1063] RuntimeError: head_dim=16 is not supported
(APIServer pid=7) ERROR 11-20 10:49:52 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: EngineCore \
encountered an issue. See stack trace (above) for the root cause.
(APIServer pid=7) INFO:     Application shutdown complete.
"""
ARGUMENT = "usage: api_server.py [-h]\napi_server.py: error: unrecognized arguments: --nonsense\n"
CONFIG = """(APIServer pid=7) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
(APIServer pid=7)   Value error, User-specified max_model_len (99999) is greater than the derived max_model_len [type=x]
(APIServer pid=7)     For further information visit https://errors.pydantic.dev
"""
BUILT_IN = "2026-11-20 10:00:00,000 workers.sampler.builtin.server /m cannot be served: no rope type 'x'\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PORT, "OSError: [Errno 98] Address already in use"),
        (MEMORY, "ValueError: Free memory on device cuda:0"),
        (SHAPE, "RuntimeError: head_dim=16 is not supported"),
        (ARGUMENT, "api_server.py: error: unrecognized arguments: --nonsense"),
        (CONFIG, "max_model_len (99999) is greater than the derived"),
        (BUILT_IN, "cannot be served: no rope type 'x'"),
        ("loading\nno such device\n", "no such device"),
        ("", "it wrote nothing"),
    ],
)
def test_the_fault_is_found_among_its_echoes_and_the_log_is_named(tmp_path: Path, text: str, words: str) -> None:
    log = tmp_path / "log"
    log.write_text(text)
    assert words in last_words(log)
    assert str(log) in last_words(log)


def test_faults_of_earlier_starts_are_not_told_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert size(log) == 0
    log.write_text("OSError: old\n")
    begin = size(log)
    with log.open("a") as file:
        file.write("loading\n")
    assert last_words(log, begin).startswith("loading")


def test_a_log_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    assert "No such file" in last_words(tmp_path / "none")
