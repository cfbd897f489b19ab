"""The pipe's messages: what goes in comes out, and nothing else does."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers import messages
from workers.messages import LoraSpec, ProtocolError, Published, Start, Step, decode, encode

names = st.text(max_size=30)
numbers = st.floats(allow_nan=False, allow_infinity=False)
figures = st.dictionaries(names, numbers, max_size=5)
published = st.builds(Published, st.integers(), names, names, names, names)
any_message = st.one_of(
    st.builds(
        Start,
        *(names,) * 6,
        st.integers(),
        st.integers(),
        numbers,
        names,
        st.builds(LoraSpec, st.integers(), st.integers(), st.lists(names, max_size=3).map(tuple)),
        names,
        st.integers(),
        snapshot=st.none() | names,
        importance_range=st.none() | st.tuples(numbers, numbers),
        max_sequence_tv=st.none() | numbers,
        beta=numbers,
        processes=st.integers(),
    ),
    st.builds(Step, st.integers(), names, names),
    st.just(messages.Stop()),
    st.builds(messages.Ready, st.integers(), published, numbers),
    st.builds(messages.Progress, names, st.integers(), st.integers()),
    st.builds(messages.StepDone, st.integers(), published, names, names, figures, figures),
    st.builds(messages.Failed, names, names, names),
)


@given(any_message)
def test_every_message_survives_the_pipe(message: Any) -> None:
    line = encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode(line) == message


def test_a_line_is_at_most_64_kib_both_ways() -> None:
    overhead = len(encode(Step(1, "", "")))
    fits = encode(Step(1, "x" * (messages.MAX_LINE_BYTES - overhead), ""))
    assert len(fits) == messages.MAX_LINE_BYTES
    assert isinstance(decode(fits), Step)
    with pytest.raises(ProtocolError, match="65537 bytes"):
        encode(Step(1, "x" * (messages.MAX_LINE_BYTES - overhead + 1), ""))
    with pytest.raises(ProtocolError, match="limit"):
        decode(b" " + fits)


LORA = {"rank": 1, "alpha": 1, "targets": ["q"]}
READY = {"type": "Ready", "step": 0, "seconds": 1.0}
PUBLISHED = {"version": 0, "name": "a", "path": "p", "sha256": "s", "canary_log_probs": "c"}


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"Traceback (most recent call last):",
        b"[1, 2]",
        b"3",
        b'"Stop"',
        b"{}",
        b'{"type": "Unknown"}',
        b'{"type": ["Stop"]}',
        b"\xff\xfe",
        json.dumps({"type": "Stop", "now": True}).encode(),
        json.dumps({"type": "Step", "step": 1}).encode(),
        json.dumps(READY).encode(),
        json.dumps({**READY, "adapter": None}).encode(),
        json.dumps({**READY, "adapter": {**PUBLISHED, "more": 1}}).encode(),
        json.dumps({**READY, "adapter": {"version": 0}}).encode(),
        json.dumps({"type": "Start", "lora": {"rank": 1}}).encode(),
        json.dumps({"type": "Start", "importance_range": 3}).encode(),
        json.dumps({"type": "Start", "lora": {**LORA, "targets": 3}}).encode(),
    ],
)
def test_what_is_not_a_message_is_a_protocol_error(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(line)


def test_unknown_fields_are_named() -> None:
    with pytest.raises(ProtocolError, match=r"Stop: unknown fields \['a', 'b'\]"):
        decode(b'{"type": "Stop", "b": 1, "a": 2}')
