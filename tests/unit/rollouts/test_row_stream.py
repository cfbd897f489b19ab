"""The endless shuffled stream of rows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.rollouts.scripted import row
from workers.rollouts.stream import RowStream

ROWS = [row(index) for index in range(7)]


def taken(stream: RowStream, count: int) -> list[int]:
    return [stream.take().index for _ in range(count)]


@given(st.integers(0, 100), st.integers(0, 40))
def test_a_resumed_stream_goes_on_as_if_it_had_never_stopped(seed: int, position: int) -> None:
    whole = taken(RowStream(ROWS, seed), 60)
    assert taken(RowStream(ROWS, seed, position), 60 - position) == whole[position:]


def test_every_epoch_holds_every_row_once_in_an_order_of_its_own() -> None:
    stream = RowStream(ROWS, 7)
    epochs = [taken(stream, 7) for _ in range(5)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert stream.position == 35


def test_another_seed_is_another_order() -> None:
    assert taken(RowStream(ROWS, 1), 14) != taken(RowStream(ROWS, 2), 14)
