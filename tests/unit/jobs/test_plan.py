"""Every `auto` becomes a number by the published formulas. Does not cover: storing the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.jobs.plan import Plan, resolve
from app.models.catalogue import BaseModel

MODEL = BaseModel(
    id="tiny",
    path=Path("/models/tiny"),
    renderer="hermes",
    context=2048,
    lora_targets=("q_proj", "v_proj"),
    base_learning_rate=1e-4,
    lora_rank=16,
    licence="Apache-2.0",
    hub_id=None,
    created=0,
)


def plan(rows: int = 64, options: dict[str, Any] | None = None, **hyperparameters: Any) -> Plan:
    method = {"type": "reinforcement", "reinforcement": {"hyperparameters": hyperparameters}}
    return resolve(method, options or {}, rows, 16, MODEL, 7)


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "steps"),
    [(10, 4, 10, 25), (64, 8, 7, 56), (200, 25, 7, 56), (1000, 32, 2, 63), (50_000, 32, 1, 1563)],
)
def test_auto_follows_the_number_of_rows(rows: int, batch: int, epochs: int, steps: int) -> None:
    made = plan(rows)
    assert (made.batch_size, made.n_epochs, made.total_steps) == (batch, epochs, steps)


@pytest.mark.parametrize(("compute", "group"), [(0.0001, 2), (0.45, 4), ("auto", 8), (1, 8), (1.5, 12), (10, 80)])
def test_compute_multiplier_sets_the_group_size(compute: Any, group: int) -> None:
    assert plan(compute_multiplier=compute).group_size == group


def test_evaluations_come_ten_times_or_at_every_step() -> None:
    assert plan(64).eval_interval == 5
    assert plan(64, n_epochs=1, batch_size=8).eval_interval == 1
    assert plan(64, eval_interval=3).eval_interval == 3


def test_the_learning_rate_is_the_models_times_the_multiplier_unless_given() -> None:
    assert plan(learning_rate_multiplier=5).learning_rate == pytest.approx(5e-4)
    assert plan(options={"learning_rate": 0.002}, learning_rate_multiplier=5).learning_rate == 0.002


def test_token_budgets_never_pass_the_models_context() -> None:
    assert plan().max_tokens_per_episode == 2048
    assert plan().max_tokens_per_turn == 512
    assert plan(options={"max_tokens_per_episode": 100}).max_tokens_per_turn == 100


def test_a_batch_larger_than_the_file_still_takes_a_step() -> None:
    assert plan(10, batch_size=256, n_epochs=1).total_steps == 1


def test_a_plan_survives_the_database() -> None:
    made = plan(options={"max_trained_rollouts": 32, "lora_rank": 4})
    assert Plan.from_dict(json.loads(json.dumps(made.as_dict()))) == made
    assert made.lora_alpha == 8


def test_the_wire_shows_numbers_in_place_of_auto() -> None:
    shown = plan().hyperparameters({"batch_size": "auto", "reasoning_effort": "low"})
    assert shown["batch_size"] == 8
    assert shown["reasoning_effort"] == "low"
    assert "auto" not in shown.values()


def test_overlap_is_on_by_default_and_masks_can_be_switched_off() -> None:
    made = plan()
    assert (made.max_staleness, made.importance_range, made.max_sequence_tv, made.kl_beta) == (1, (0.5, 2.0), 0.25, 0.0)
    off = plan(options={"max_staleness": 0, "importance_range": "off", "max_sequence_tv": "off", "kl_beta": 0.1})
    assert (off.max_staleness, off.importance_range, off.max_sequence_tv, off.kl_beta) == (0, None, None, 0.1)
