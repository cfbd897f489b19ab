"""A bf16 policy scored in fp32. Does not cover: what the scores are for."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

from tests.unit.trainer.tiny_policy import CONFIGS, LINEAR, make_rows, save_model
from workers.messages import LoraSpec
from workers.trainer import model, precise, scoring

LORA = LoraSpec(4, 8, LINEAR)


def gap(left: list[list[float]], right: list[list[float]]) -> float:
    return max(abs(a - b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("family", "window"), [*((name, None) for name in sorted(CONFIGS)), ("mistral", 16)])
def test_widened_scores_are_those_of_the_same_weights_in_fp32(family: str, window: int | None, tmp_path: Path) -> None:
    policy = model.load_policy(str(save_model(tmp_path, family, window=window)), "bfloat16", LORA, 1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    wide = copy.deepcopy(policy).float()
    rows = [row.ids for row in make_rows(3)]
    exact = scoring.score_rows(wide, rows, 1.0)
    before = {name: (p.dtype, p.data_ptr()) for name, p in policy.named_parameters()}
    with precise.widened(policy):
        found = scoring.score_rows(policy, rows, 1.0)
    assert gap(found, exact) < 1e-4
    rounded = scoring.score_rows(policy, rows, 1.0)
    assert gap(rounded, exact) > 1e-2  # what it saves us from, and the hooks are gone
    assert {name: (p.dtype, p.data_ptr()) for name, p in policy.named_parameters()} == before
    assert all(math.isfinite(value) for row in rounded for value in row)


def test_the_weights_come_back_when_a_forward_fails(tmp_path: Path) -> None:
    policy = model.load_policy(str(save_model(tmp_path)), "bfloat16", LORA, 1)
    with pytest.raises((IndexError, RuntimeError)), precise.widened(policy):
        scoring.score_rows(policy, [[1, 2, 10_000]], 1.0)
    layer = policy.get_base_model().base_model.layers[1]
    with precise.widened(policy):
        layer.register_forward_pre_hook(lambda *_: 1 // 0)  # after ours
        with pytest.raises(ZeroDivisionError):
            scoring.score_rows(policy, [[1, 2, 3]], 1.0)
    narrow = {p.dtype for name, p in policy.named_parameters() if "lora" not in name}
    assert narrow == {torch.bfloat16}
