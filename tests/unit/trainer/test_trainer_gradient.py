"""The contract with TRL, PEFT and transformers: one update is the update that plain torch would make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_policy import CONFIGS, LINEAR, make_rows, save_model
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from workers.batch import TrainingRow
from workers.messages import LoraSpec
from workers.trainer import attention, grpo, layers, model, scoring
from workers.trainer.budget import Budget

HYPER = grpo.Hyperparameters(
    steps=1, learning_rate=1e-3, loss_type="dapo", temperature=1.0, epsilon=0.2, max_grad_norm=1e9, seed=0
)
LORA = LoraSpec(4, 8, LINEAR)


class _Gradients(TrainerCallback):  # type: ignore[misc]  # untyped base
    def __init__(self) -> None:
        self.taken: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: object, state: object, control: object, **kwargs: object) -> None:
        policy = kwargs["model"]
        assert isinstance(policy, PeftModel)
        self.taken = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def load(path: Path) -> PeftModel:
    """A policy whose B is not zero, so that every adapter weight has a gradient."""
    policy = model.load_policy(str(path), "float32", LORA, seed=3)
    _randomise_b(policy)
    return policy


def _randomise_b(policy: PeftModel) -> None:
    generator = torch.Generator().manual_seed(11)
    for name, parameter in sorted(policy.named_parameters()):
        if ".lora_B." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def update(
    policy: PeftModel, rows: Sequence[TrainingRow], directory: Path, *, budget: int = 10_000, padded: bool = False
) -> tuple[dict[str, Tensor], grpo.PackedGRPO]:
    gradients = _Gradients()
    optimizers = grpo.make_optimizer(policy, HYPER.learning_rate)
    trainer = grpo.PackedGRPO(policy, HYPER, str(directory), lambda: rows, lambda *_: None, gradients, optimizers)
    trainer.budget = Budget(budget)
    if padded:
        trainer.packs = False
        policy.get_base_model().set_attn_implementation("sdpa")
    trainer.train()
    return gradients.taken, trainer


def reference(path: Path, rows: Sequence[TrainingRow]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(gradients, weights after the step): HF model, PEFT's own layers, one row at a time, the loss written out."""
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(3)
    policy = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=list(LINEAR), task_type="CAUSAL_LM"))
    source = load(path).state_dict()
    policy.load_state_dict(source)
    total = sum(sum(row.mask[1:]) for row in rows)
    for row in rows:
        log_all = torch.log_softmax(policy(input_ids=torch.tensor([row.ids])).logits[0, :-1], dim=-1)
        new = log_all.gather(1, torch.tensor(row.ids[1:])[:, None])[:, 0]
        ratio = (new - torch.tensor(row.log_probs[1:])).exp()
        gain = torch.minimum(ratio * row.advantage, ratio.clamp(0.8, 1.2) * row.advantage)
        torch.autograd.backward([-(gain * torch.tensor(row.mask[1:])).sum() / total])
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    gradients = {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
    torch.optim.AdamW(trained.values(), lr=HYPER.learning_rate, betas=(0.9, 0.99), weight_decay=0.0).step()
    return gradients, {n: p.detach().clone() for n, p in trained.items()}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def with_own_log_probs(policy: PeftModel, rows: Sequence[TrainingRow]) -> list[TrainingRow]:
    scores = scoring.score_rows(policy, [row.ids for row in rows], 1.0)
    return [
        replace(row, log_probs=[0.0, *(s * m for s, m in zip(score, row.mask[1:], strict=True))])
        for row, score in zip(rows, scores, strict=True)
    ]


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize(("padded", "budget"), [(False, 10_000), (False, 150), (False, 70), (True, 200)])
def test_one_update_is_the_update_of_plain_torch(family: str, padded: bool, budget: int, tmp_path: Path) -> None:
    path = save_model(tmp_path / "model", family)
    rows = with_own_log_probs(load(path), make_rows(1))
    policy = load(path)
    gradients, trainer = update(policy, rows, tmp_path, padded=padded, budget=budget)
    wanted, after = reference(path, rows)
    assert max(g.abs().max().item() for g in wanted.values()) > 1e-3
    assert difference(gradients, wanted) < 1e-6
    assert difference({n: p.detach() for n, p in policy.named_parameters() if p.requires_grad}, after) < 1e-5
    metrics = trainer.diagnostics.metrics()
    assert (metrics["micro_batches"] == 1) == (budget == 10_000)
    assert (metrics["forwarded_tokens"] < metrics["raw_tokens"]) != padded


def test_with_the_policys_own_log_probs_the_ratio_is_one(llama: Path, tmp_path: Path) -> None:
    policy = load(llama)
    _, trainer = update(policy, with_own_log_probs(policy, make_rows(1)), tmp_path)
    metrics = trainer.diagnostics.metrics()
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["mismatch_max"] < 3e-6
    assert 0 <= metrics["mismatch_kl"] < 1e-9
    assert metrics["clip_ratio_low"] == metrics["clip_ratio_high"] == 0.0


def test_off_policy_log_probs_enter_the_ratio_and_the_clip(llama: Path, tmp_path: Path) -> None:
    rows = make_rows(2)
    gradients, trainer = update(load(llama), rows, tmp_path)
    assert difference(gradients, reference(llama, rows)[0]) < 1e-5
    metrics = trainer.diagnostics.metrics()
    assert metrics["clip_ratio_low"] > 0
    assert metrics["clip_ratio_high"] > 0


def test_masked_tokens_carry_no_gradient(llama: Path, tmp_path: Path) -> None:
    rows = make_rows(3)
    plain, _ = update(load(llama), rows, tmp_path)
    noise = [replace(r, log_probs=[p if m else -9.0 for p, m in zip(r.log_probs, r.mask, strict=True)]) for r in rows]
    silent = TrainingRow(rows[0].ids[:-2], [0] * (len(rows[0].ids) - 2), [0.0] * (len(rows[0].ids) - 2), 5.0, 0)
    noisy, trainer = update(load(llama), [*noise, silent], tmp_path)
    assert difference(plain, noisy) < 1e-7
    assert trainer.diagnostics.tokens == sum(sum(row.mask) for row in rows)


def test_a_long_row_is_checkpointed_and_gives_the_same_gradient(llama: Path, tmp_path: Path) -> None:
    rows = make_rows(4)
    plain, _ = update(load(llama), rows, tmp_path)
    saved, trainer = update(load(llama), rows, tmp_path, budget=20)
    assert trainer.model.get_base_model().is_activation_checkpointing
    assert difference(plain, saved) < 1e-6


def test_long_tails_and_deep_paths_take_calls_of_their_own(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.trainer.packing.MAX_BATCHED_TAIL", 12)
    monkeypatch.setattr("workers.trainer.packing.MAX_BATCHED_CELLS", 2_000)
    monkeypatch.setattr("workers.trainer.packing.MAX_ALONE_CELLS", 100)
    rows = make_rows(5)
    gradients, _ = update(load(llama), rows, tmp_path)
    assert difference(gradients, reference(llama, rows)[0]) < 1e-5


@pytest.mark.parametrize("loss", sorted(grpo.LOSSES))
def test_every_offered_loss_takes_a_finite_step(
    loss: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.HYPER", replace(HYPER, loss_type=loss))
    gradients, trainer = update(load(llama), make_rows(6), tmp_path, budget=90)
    assert 0 < trainer.grad_norm < float("inf")
    assert all(torch.isfinite(g).all() for g in gradients.values())


def test_a_loss_that_averages_micro_batches_is_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.HYPER", replace(HYPER, loss_type="grpo"))
    with pytest.raises(grpo.UnknownLoss, match="grpo"):
        update(load(llama), make_rows(6), tmp_path)


def test_a_batch_without_a_trained_token_is_refused(llama: Path, tmp_path: Path) -> None:
    rows = [replace(row, mask=[0] * len(row.ids)) for row in make_rows(6)]
    with pytest.raises(grpo.EmptyBatch):
        update(load(llama), rows, tmp_path)


def test_bf16_keeps_fp32_adapter_weights_and_stays_near_the_fp32_gradient(llama: Path, tmp_path: Path) -> None:
    rows = with_own_log_probs(load(llama), make_rows(1))
    wide, _ = update(load(llama), rows, tmp_path)
    policy = model.load_policy(str(llama), "bfloat16", LORA, seed=3)
    _randomise_b(policy)
    narrow, trainer = update(policy, rows, tmp_path)
    flat = [torch.cat([g.flatten() for _, g in sorted(grads.items())]) for grads in (wide, narrow)]
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert torch.cosine_similarity(flat[0], flat[1], dim=0) > 0.99
    assert trainer.diagnostics.metrics()["mismatch_kl"] < 8e-3


def test_the_short_layers_equal_pefts_and_transformers_own(llama: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    policy = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=list(LINEAR), task_type="CAUSAL_LM"))
    _randomise_b(policy)
    ids = torch.arange(20)[None]
    before = policy(input_ids=ids).logits
    layers.speed_up(policy)
    assert (policy(input_ids=ids).logits - before).abs().max() < 1e-5
    with policy.disable_adapter():
        off = policy(input_ids=ids).logits
    assert (off - before).abs().max() > 1e-3


def test_a_model_that_does_not_hand_the_plan_on_is_noticed() -> None:
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="tree plan"):
        attention.tree_attention(torch.nn.Identity(), x, x, x, None, 1.0)
