"""The contract with TRL, PEFT and transformers: one update is the update that plain torch would make."""

from __future__ import annotations

import math
import random
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
from workers.trainer import attention, budget, grpo, layers, model, scoring
from workers.trainer.importance import Limits

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
    policy: PeftModel,
    rows: Sequence[TrainingRow],
    directory: Path,
    *,
    tokens: int = 10_000,
    padded: bool = False,
    hyper: grpo.Hyperparameters = HYPER,
) -> tuple[dict[str, Tensor], grpo.PackedGRPO]:
    gradients = _Gradients()
    optimizers = grpo.make_optimizer(policy, hyper.learning_rate)
    trainer = grpo.PackedGRPO(policy, hyper, str(directory), lambda: rows, lambda *_: None, gradients, optimizers)
    trainer.budget = budget.Budget(tokens)
    trainer.arrange = budget.padded if padded else budget.packed
    trainer.train()
    return gradients.taken, trainer


def reference(
    path: Path, rows: Sequence[TrainingRow], hyper: grpo.Hyperparameters = HYPER
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(gradients, weights after the step): HF model, PEFT's own layers, one row at a time, the loss written out."""
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(3)
    policy = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=list(LINEAR), task_type="CAUSAL_LM"))
    source = load(path).state_dict()
    policy.load_state_dict(source)
    total = sum(sum(row.mask[1:]) for row in rows)
    for row in rows:
        new = row_log_probs(policy, row)
        with torch.no_grad(), policy.disable_adapter():
            to_base = row_log_probs(policy, row) - new.detach()
        kept = reference_mask(new.detach(), row, hyper.limits)
        if not kept.any():
            continue
        loss = reference_loss(new, row, kept, hyper)
        # The same value as k3 = e^x - x - 1 with x = base - policy; its derivative by the policy's log-prob is 1 - e^x.
        kl = (1 - to_base.exp()) * new
        torch.autograd.backward([((loss + hyper.beta * kl) * kept).sum() / total])
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    gradients = {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
    torch.optim.AdamW(trained.values(), lr=hyper.learning_rate, betas=(0.9, 0.99), weight_decay=0.0).step()
    return gradients, {n: p.detach().clone() for n, p in trained.items()}


def row_log_probs(policy: PeftModel, row: TrainingRow) -> Tensor:
    log_all = torch.log_softmax(policy(input_ids=torch.tensor([row.ids])).logits[0, :-1], dim=-1)
    return log_all.gather(1, torch.tensor(row.ids[1:])[:, None])[:, 0]


def reference_mask(new: Tensor, row: TrainingRow, limits: Limits) -> Tensor:
    trained = torch.tensor(row.mask[1:], dtype=torch.bool)
    ratio = (new - torch.tensor(row.log_probs[1:])).exp()
    kept = trained.clone()
    if limits.token:
        kept &= (ratio >= limits.token[0]) & (ratio <= limits.token[1])
    if limits.sequence and trained.any() and (ratio[trained] - 1).abs().mean() / 2 > limits.sequence:
        kept[:] = False
    return kept


def reference_loss(new: Tensor, row: TrainingRow, kept: Tensor, hyper: grpo.Hyperparameters) -> Tensor:
    """Per token; the clip's width is 0.2, VESPO's constants are TRL's defaults."""
    a = row.advantage
    ratio = (new - torch.tensor(row.log_probs[1:])).exp()
    if hyper.loss_type == "dapo":
        return -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    if hyper.loss_type == "cispo":
        return -ratio.detach().clamp(max=1.2) * a * new
    k, scale = (2.0, 3.0) if a >= 0 else (3.0, 2.0)
    w = ratio.detach()[kept].log().sum().clamp(math.log(1e-8), 20.0).exp()
    return -(w**k * (scale * (1 - w)).exp()) * a * new


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def with_own_log_probs(policy: PeftModel, rows: Sequence[TrainingRow]) -> list[TrainingRow]:
    scores = scoring.score_rows(policy, [row.ids for row in rows], 1.0)
    return [
        replace(row, log_probs=[0.0, *(s * m for s, m in zip(score, row.mask[1:], strict=True))])
        for row, score in zip(rows, scores, strict=True)
    ]


def with_noise(rows: Sequence[TrainingRow], deviation: float) -> list[TrainingRow]:
    rng = random.Random(5)
    return [
        replace(r, log_probs=[p + m * rng.gauss(0, deviation) for p, m in zip(r.log_probs, r.mask, strict=True)])
        for r in rows
    ]


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize(("padded", "tokens"), [(False, 10_000), (False, 150), (False, 70), (True, 200)])
def test_one_update_is_the_update_of_plain_torch(family: str, padded: bool, tokens: int, tmp_path: Path) -> None:
    path = save_model(tmp_path / "model", family)
    rows = with_own_log_probs(load(path), make_rows(1))
    policy = load(path)
    gradients, trainer = update(policy, rows, tmp_path, padded=padded, tokens=tokens)
    wanted, after = reference(path, rows)
    assert max(g.abs().max().item() for g in wanted.values()) > 1e-3
    assert difference(gradients, wanted) < 1e-6
    assert difference({n: p.detach() for n, p in policy.named_parameters() if p.requires_grad}, after) < 1e-5
    metrics = trainer.diagnostics.metrics()
    assert (metrics["micro_batches"] == 1) == (tokens == 10_000)
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
    saved, trainer = update(load(llama), rows, tmp_path, tokens=20)
    assert trainer.model.get_base_model().is_activation_checkpointing
    assert difference(plain, saved) < 1e-6


def test_long_tails_and_deep_paths_take_calls_of_their_own(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.trainer.packing.MAX_BATCHED_TAIL", 12)
    monkeypatch.setattr("workers.trainer.packing.MAX_BATCHED_CELLS", 2_000)
    monkeypatch.setattr("workers.trainer.packing.MAX_ALONE_CELLS", 100)
    monkeypatch.setattr("workers.trainer.attention.TAIL_BLOCK", 5)
    rows = make_rows(5)
    behind = [replace(row, ids=[*row.ids[:9], *row.ids[:8:-1]]) for row in rows]  # tails longer than what is shared
    rows += [replace(row, mask=[0, *[1] * (len(row.ids) - 1)], log_probs=[-3.0] * len(row.ids)) for row in behind[::5]]
    gradients, _ = update(load(llama), rows, tmp_path)
    assert difference(gradients, reference(llama, rows)[0]) < 1e-5


@pytest.mark.parametrize("loss", sorted(grpo.LOSSES))
@pytest.mark.parametrize(("padded", "tokens"), [(False, 10_000), (False, 90), (True, 200), (True, 40)])
def test_every_loss_with_masks_and_kl_is_that_of_plain_torch(
    loss: str, padded: bool, tokens: int, llama: Path, tmp_path: Path
) -> None:
    hyper = replace(HYPER, loss_type=loss, beta=0.1, limits=Limits((0.5, 2.0), 0.25))
    rows = with_noise(with_own_log_probs(load(llama), make_rows(6)), 0.6)
    gradients, trainer = update(load(llama), rows, tmp_path, tokens=tokens, padded=padded, hyper=hyper)
    wanted, _ = reference(llama, rows, hyper)
    assert max(g.abs().max().item() for g in wanted.values()) > 1e-4
    assert difference(gradients, wanted) < 1e-6
    for without in (replace(hyper, beta=0.0), replace(hyper, limits=Limits())):  # each part is felt
        assert difference(gradients, reference(llama, rows, without)[0]) > 1e-5
    metrics = trainer.diagnostics.metrics()
    assert 0 < metrics["masked_sequence_share"] < 1
    assert metrics["masked_sequence_share"] < metrics["masked_token_share"] < 1


def test_a_model_that_does_not_pack_takes_trls_head_and_the_same_gradient(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model", "mistral", window=500)
    hyper = replace(HYPER, beta=0.1, limits=Limits((0.5, 2.0), 0.25), temperature=1.0)
    rows = with_noise(with_own_log_probs(load(path), make_rows(6)), 0.6)
    policy = load(path)
    assert not model.packs(policy.get_base_model().config)
    gradients, _ = update(policy, rows, tmp_path, tokens=200, padded=True, hyper=hyper)
    assert difference(gradients, reference(path, rows, hyper)[0]) < 1e-6


def test_trl_reports_nothing_to_anybody(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[object] = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *args, **_: sent.append(args))
    monkeypatch.delenv("CI", raising=False)  # TRL is silent there by itself
    update(load(llama), make_rows(1), tmp_path)
    assert sent == []


def test_a_batch_of_which_everything_is_masked_is_refused(llama: Path, tmp_path: Path) -> None:
    hyper = replace(HYPER, limits=Limits((0.99, 1.01), None))
    with pytest.raises(grpo.NothingKept, match="sampler and trainer disagree"):
        update(load(llama), [replace(r, log_probs=[-60.0] * len(r.ids)) for r in make_rows(6)], tmp_path, hyper=hyper)


def test_a_masked_ratio_beyond_all_numbers_leaves_the_rest_alone(llama: Path, tmp_path: Path) -> None:
    hyper = replace(HYPER, limits=Limits((0.5, 2.0), None))
    rows = with_own_log_probs(load(llama), make_rows(6))
    wild = [replace(rows[0], log_probs=[-500.0 * m for m in rows[0].mask]), *rows[1:]]
    gradients, trainer = update(load(llama), wild, tmp_path, hyper=hyper)
    assert difference(gradients, reference(llama, wild, hyper)[0]) < 1e-6
    assert trainer.diagnostics.metrics()["masked_token_share"] > 0


def test_a_loss_that_averages_micro_batches_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(grpo.UnknownLoss, match="grpo"):
        update(load(llama), make_rows(6), tmp_path, hyper=replace(HYPER, loss_type="grpo"))


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
