"""The endless shuffled stream of rows, and the cursor that returns to it."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.rollouts.scripted import row
from workers.rollouts.stream import Consumed, RowStream

ROWS = [row(index) for index in range(7)]


def taken(stream: RowStream, count: int) -> list[int]:
    return [stream.take()[1].index for _ in range(count)]


@given(st.integers(0, 100), st.integers(0, 40))
def test_a_resumed_stream_goes_on_as_if_it_had_never_stopped(seed: int, position: int) -> None:
    whole = taken(RowStream(ROWS, seed), 60)
    assert taken(RowStream(ROWS, seed, {"position": position}), 60 - position) == whole[position:]


@given(st.lists(st.integers(0, 30), unique=True), st.integers(0, 10))
def test_what_was_consumed_out_of_order_is_not_taken_again_and_nothing_is_skipped(used: list[int], cut: int) -> None:
    consumed = Consumed({})
    consumed.add(used[:cut])
    again = Consumed(json.loads(json.dumps(consumed.cursor())))
    again.add(used[cut:])
    stream = RowStream(ROWS, 3, again.cursor())
    assert [stream.take()[0] for _ in range(10)] == [n for n in range(60) if n not in used][:10]


def test_consumed_positions_in_order_are_one_number() -> None:
    consumed = Consumed({})
    consumed.add([2, 0])
    assert consumed.cursor() == {"position": 1, "taken": [2]}
    consumed.add([1])
    assert consumed.cursor() == {"position": 3, "taken": []}


def test_every_epoch_holds_every_row_once_in_an_order_of_its_own() -> None:
    stream = RowStream(ROWS, 7)
    epochs = [taken(stream, 7) for _ in range(5)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_another_seed_is_another_order() -> None:
    assert taken(RowStream(ROWS, 1), 14) != taken(RowStream(ROWS, 2), 14)
