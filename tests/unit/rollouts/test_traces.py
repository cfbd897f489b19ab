"""Trace files: appended frames, read back at their place, never outside their directory."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.rollouts.traces import TraceDamaged, TraceMissing, Traces, append_trace, pack, unpack
from app.storage.local import LocalStore


@given(st.lists(st.integers(0, 2**31 - 1)))
def test_ids_survive_packing(values: list[int]) -> None:
    assert unpack(pack(values, "ids"), "ids") == values


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_log_probs_survive_packing_as_single_precision(values: list[float]) -> None:
    assert unpack(pack(values, "log_probs"), "log_probs") == values


def test_every_frame_is_found_again_after_the_file_has_grown(tmp_path: Path) -> None:
    file = tmp_path / "ftjob-1" / "a1" / "step-1.jsonl.zst"
    places = [append_trace(file, {"n": n, "text": "ä\n" * n}) for n in range(5)]
    assert places[0][0] == 0
    assert [place[0] for place in places[1:]] == [offset + length for offset, length in places[:-1]]
    name = str(file.relative_to(tmp_path))
    assert [Traces(tmp_path).read(name, *place)["n"] for place in reversed(places)] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret"])
def test_nothing_outside_the_directory_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "traces").mkdir()
    offset, length = append_trace(tmp_path / "secret", {"n": 1})
    with pytest.raises(TraceMissing):
        Traces(tmp_path / "traces").read(name, offset, length)


def test_a_trace_that_is_gone_says_so(tmp_path: Path) -> None:
    with pytest.raises(TraceMissing, match="gone"):
        Traces(tmp_path).read("gone", 0, 9)


def test_a_changed_byte_is_refused_wherever_it_is(tmp_path: Path) -> None:
    offset, length = append_trace(tmp_path / "t", {"n": 1, "text": "as it was said"})
    right = (tmp_path / "t").read_bytes()
    for at in range(length):
        (tmp_path / "t").write_bytes(right[:at] + bytes([right[at] ^ 1]) + right[at + 1 :])
        with pytest.raises(TraceDamaged, match=r"^t at 0"):
            Traces(tmp_path).read("t", offset, length)
    (tmp_path / "t").write_bytes(right)
    for place in ((offset + 1, length), (offset, length - 1), (offset, length + 1)):
        with pytest.raises(TraceDamaged):
            Traces(tmp_path).read("t", *place)


def test_what_another_host_wrote_is_read_from_storage(tmp_path: Path) -> None:
    place = append_trace(tmp_path / "store" / "j" / "t", {"n": 1})
    traces = Traces(tmp_path / "here", LocalStore(tmp_path / "store"))
    assert traces.read("j/t", *place) == {"n": 1}
    with pytest.raises(TraceMissing):
        traces.read("j/gone", *place)
