"""The result file: one line a step, whatever number of events a step had."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from app.files.storage import Storage
from workers.results import COLUMNS, table, write_result_file


def lines(history: list[dict]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table(history))))


def test_events_of_one_step_make_one_line_and_later_ones_win() -> None:
    history = [
        {"step": 0, "full_valid_mean_reward": 0.25, "timing": {"step": {"eval": 3.0}}},
        {"step": 2, "train_mean_reward": 0.75},
        {"step": 1, "train_mean_reward": 0.5, "timing": {"step": {"sampling": 1.0, "full_iteration": 4.0}}},
        {"step": 1, "train_mean_reward": 0.5, "full_valid_mean_reward": 0.625, "timing": {"step": {"eval": 2.0}}},
    ]
    zero, one, two = lines(history)
    assert tuple(zero) == COLUMNS
    assert (zero["step"], zero["train_mean_reward"], zero["full_valid_mean_reward"]) == ("0", "", "0.25")
    assert (one["sampling_duration"], one["eval_duration"], one["total_duration"]) == ("1.0", "2.0", "4.0")
    assert (one["full_valid_mean_reward"], two["train_mean_reward"]) == ("0.625", "0.75")


def test_a_later_event_without_a_number_does_not_erase_it() -> None:
    (line,) = lines([{"step": 1, "tool_calls_mean": 0.0}, {"step": 1, "tool_calls_mean": None}])
    assert line["tool_calls_mean"] == "0.0"


def test_without_events_there_is_a_header() -> None:
    assert table([]).split() == [",".join(COLUMNS)]


def test_the_file_is_stored_with_its_digest(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    file_id, stored = write_result_file(storage, "step\n1\n")
    with storage.open(file_id, stored.sha256) as file:
        assert file.read() == b"step\n1\n"
    assert stored.bytes == 7
