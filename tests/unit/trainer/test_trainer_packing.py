"""The trie plan: nothing forwarded twice, every trained token scored from its own context, memory respected."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.trainer.budget import Budget, packed, padded
from workers.trainer.packing import plan_tree

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=9), min_size=1, max_size=12)
BUDGETS = st.integers(1, 40).map(Budget)


@settings(max_examples=150, deadline=None)
@given(ROWS)
def test_every_distinct_prefix_that_predicts_is_forwarded_exactly_once(rows: list[list[int]]) -> None:
    plan = plan_tree(rows, [[1] * len(row) for row in rows], torch.device("cpu"))
    assert plan.forwarded == len({tuple(row[:end]) for row in rows for end in range(1, len(row))})
    assert len(plan.scored_ids) == len({tuple(row[:end]) for row in rows for end in range(2, len(row) + 1)})
    assert [call.start for call in plan.calls] == [0, *(call.stop for call in plan.calls[:-1])]
    assert plan.calls[-1].stop == plan.forwarded


@settings(max_examples=150, deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_a_trained_token_is_scored_at_the_slot_before_it(rows: list[list[int]], rng: object) -> None:
    masks = [[rng.randrange(2) for _ in row] for row in rows]  # type: ignore[attr-defined]
    plan = plan_tree(rows, masks, torch.device("cpu"))
    seen = set()
    for row, position, node in zip(
        plan.trained_rows.tolist(), plan.trained_positions.tolist(), plan.trained_nodes.tolist(), strict=True
    ):
        slot = int(plan.scored_slots[node])
        assert int(plan.scored_ids[node]) == rows[row][position]
        assert int(plan.positions[0, slot]) == position - 1
        assert int(plan.ids[0, slot]) == rows[row][position - 1]
        seen.add((row, position))
    assert seen == {(r, p) for r, mask in enumerate(masks) for p, trained in enumerate(mask) if trained and p}


@settings(max_examples=150, deadline=None)
@given(ROWS, BUDGETS)
def test_micro_batches_take_every_row_once_and_keep_to_the_budget(rows: list[list[int]], budget: Budget) -> None:
    for cut in (packed(rows, budget), padded(rows, budget)):
        assert sorted(index for batch in cut.rows for index in batch) == list(range(len(rows)))
        assert cut.checkpoint == (max(map(len, rows)) > budget.tokens)
        limit = budget.checkpointed_tokens if cut.checkpoint else budget.tokens
        for batch in cut.rows:
            chosen = [rows[index] for index in batch]
            forwarded = len({tuple(row[:end]) for row in chosen for end in range(1, len(row))})
            assert len(batch) == 1 or forwarded <= limit
