"""Log-probs of tokens under the policy: one packed forward pass, or padded rows where packing does not apply.

Does not cover: the loss (TRL's, through `workers.trainer.grpo`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.trainer.head import token_log_probs
from workers.trainer.model import attend, packs
from workers.trainer.packing import TreePlan, plan_tree

CANARY_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Scores:
    """Per trained position of the plan, in its order: log-prob (differentiable) and entropy (not)."""

    log_probs: Tensor
    entropy: Tensor


def score_tree(policy: Any, plan: TreePlan, temperature: float) -> Scores:
    """Forward the packed row through the base model of `policy` and score the plan's nodes."""
    causal = policy.get_base_model()
    output = causal.base_model(input_ids=plan.ids, position_ids=plan.positions, use_cache=False, tree=plan)
    hidden = output.last_hidden_state[0].index_select(0, plan.scored_slots)
    head = causal.get_output_embeddings()
    weight = head.weight.to(hidden.dtype)  # the head's own, unless the forward is wider (`precise`)
    log_probs, entropy = token_log_probs(hidden, weight, plan.scored_ids, temperature)
    return Scores(log_probs.index_select(0, plan.trained_nodes), entropy.index_select(0, plan.trained_nodes))


def score_padded(policy: Any, ids: Tensor, where: tuple[Tensor, Tensor], temperature: float) -> Scores:
    """ids [rows, tokens], padded on the right; score the tokens at (row, position), position 1 at least.

    No attention mask: a causal model never looks to the right, where the padding is.
    """
    causal = policy.get_base_model()
    hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state
    rows, positions = where
    head = causal.get_output_embeddings()
    scores = token_log_probs(hidden[rows, positions - 1], head.weight, ids[rows, positions], temperature)
    return Scores(*scores)


@torch.no_grad()
def score_rows(policy: Any, rows: Sequence[Sequence[int]], temperature: float) -> list[list[float]]:
    """Teacher-forced log-probs of each row from its second token on: len(row) - 1 values per row."""
    result = [[0.0] * (len(row) - 1) for row in rows]
    plain = packs(policy.get_base_model().config)
    if plain:
        attend(policy, as_trie=True)
    for chunk in _chunks(rows):
        if plain:
            device = next(policy.parameters()).device
            plan = plan_tree([rows[i] for i in chunk], [[1] * len(rows[i]) for i in chunk], device)
            scores = score_tree(policy, plan, temperature).log_probs.tolist()
            where = zip(plan.trained_rows.tolist(), plan.trained_positions.tolist(), scores, strict=True)
            for row, position, value in where:
                result[chunk[row]][position - 1] = value
        else:
            for i in chunk:
                result[i] = _score_alone(policy, rows[i], temperature)
    return result


def _chunks(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    chunks: list[list[int]] = []
    room = 0
    for index in (i for i, row in enumerate(rows) if len(row) > 1):
        if not chunks or len(rows[index]) > room:
            chunks.append([])
            room = CANARY_TOKENS_AT_ONCE
        chunks[-1].append(index)
        room -= len(rows[index])
    return chunks


def _score_alone(policy: Any, row: Sequence[int], temperature: float) -> list[float]:
    ids = torch.as_tensor([row], device=next(policy.parameters()).device)
    logits = policy(input_ids=ids, use_cache=False).logits[0, :-1].float() / temperature
    scores: list[float] = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0].tolist()
    return scores
