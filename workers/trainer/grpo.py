"""The update: TRL's stable GRPOTrainer fed with whole optimizer-step batches from our rollout engine.

Does not cover: where batches come from and what follows a step (`workers.trainer.session`), advantages (they arrive
with the rows), rewards and generation (TRL's own are never used).

Private names of TRL 1.16.0 this relies on: `_prepare_inputs`, `_get_per_token_logps_and_entropies`, `_metrics`, and the
keys of the batch dictionary. The contract test in tests/unit/trainer holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from workers.batch import TrainingRow
from workers.trainer import budget
from workers.trainer.diagnostics import Diagnostics
from workers.trainer.model import packs
from workers.trainer.packing import TreePlan, plan_tree
from workers.trainer.scoring import score_tree

# Losses whose token mean is exact over a whole optimizer step.
LOSSES = frozenset({"dapo", "cispo", "vespo"})


class EmptyBatch(Exception):
    """A batch without a trained token: Adam would move the weights on a zero gradient."""


class UnsupportedLaunch(Exception):
    """More than one process: the packed forward goes past the wrapper that would average gradients."""


class UnknownLoss(Exception):
    """A loss whose micro-batch average is not the token mean of the step."""


@dataclass(frozen=True)
class Hyperparameters:
    """What the optimizer step is made of. `steps` still to take in this process."""

    steps: int
    learning_rate: float
    loss_type: str
    temperature: float
    epsilon: float
    max_grad_norm: float
    seed: int


@dataclass(frozen=True)
class MicroBatch:
    """TRL's dictionary for some rows, and their trie plan (None: padded)."""

    inputs: dict[str, Tensor]
    plan: TreePlan | None
    forwarded: int


class PackedGRPO(GRPOTrainer):  # type: ignore[misc]  # untyped base
    """One optimizer step = one call of `next_rows` = one batch, in as many micro-batches as memory asks for."""

    def __init__(
        self,
        policy: PeftModel,
        hyper: Hyperparameters,
        output_dir: str,
        next_rows: Callable[[], Sequence[TrainingRow]],
        progress: Callable[[int, int], None],
        callback: TrainerCallback,
        optimizers: tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR],
    ) -> None:
        self._next_rows, self._progress, self._hyper = next_rows, progress, hyper
        self._micro: MicroBatch | None = None
        self._done = self._total = 0
        self.diagnostics = Diagnostics(hyper.epsilon)
        self.step_loss = self.grad_norm = 0.0
        super().__init__(
            model=policy,
            reward_funcs=_no_reward,
            args=_arguments(hyper, output_dir),
            # One placeholder prompt per step: nothing of it is read, but the data loader must not run dry.
            train_dataset=Dataset.from_dict({"prompt": [""] * max(2, 2 * hyper.steps)}),
            processing_class=_placeholder_tokenizer(),
            callbacks=[callback],
            optimizers=optimizers,
        )
        if self.accelerator.num_processes > 1:
            raise UnsupportedLaunch(f"{self.accelerator.num_processes} processes; the trainer runs in one")
        self.packs = packs(policy.get_base_model().config)
        self.budget = budget.token_budget(policy.config, policy.get_base_model().dtype, self.accelerator.device)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        rows = self._next_rows()
        self.diagnostics = Diagnostics(self._hyper.epsilon, raw_tokens=sum(len(row.ids) for row in rows))
        self._metrics["train"].clear()
        trained = sum(sum(row.mask[1:]) for row in rows)
        if not trained:
            raise EmptyBatch(f"none of the {len(rows)} rows has a trained token")
        cut = (budget.packed if self.packs else budget.padded)([row.ids for row in rows], self.budget)
        self._set_checkpointing(cut.checkpoint)
        losses = []
        self._done, self._total = 0, 2 * len(cut.rows)
        self._progress(0, self._total)
        for indices in cut.rows:
            self._micro = self._collate([rows[i] for i in indices], trained)
            self.diagnostics.forwarded_tokens += self._micro.forwarded
            losses.append(super().training_step(model, inputs, num_items_in_batch))
            self._advance()
        self._micro = None
        loss = torch.stack(losses).sum()
        self.step_loss = loss.item()
        return loss

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Tensor]:
        assert self._micro is not None
        return self._micro.inputs

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        micro = self._micro
        assert micro is not None
        if micro.plan is None:
            log_probs, entropy, aux = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
            where = micro.inputs["tool_mask"].nonzero(as_tuple=True)
        else:
            plan, aux = micro.plan, None
            scores = score_tree(self.accelerator.unwrap_model(model), plan, self._hyper.temperature)
            where = (plan.trained_rows, plan.trained_positions - 1)
            blank = torch.zeros(input_ids.shape[0], logits_to_keep, device=input_ids.device)
            log_probs = blank.index_put(where, scores.log_probs)
            entropy = blank.index_put(where, scores.entropy)
        self._advance()
        self.diagnostics.add(
            log_probs[where],
            micro.inputs["old_per_token_logps"][where],
            entropy[where],
            micro.inputs["advantages"][where[0]],
        )
        return log_probs, entropy, aux

    def _advance(self) -> None:
        """A forward or a backward pass is done."""
        self._done += 1
        self._progress(self._done, self._total)

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        self.grad_norm = float(norm)
        return norm

    def _collate(self, rows: Sequence[TrainingRow], trained: int) -> MicroBatch:
        """TRL's keys, right-padded. The first token is the prompt; `tool_mask` says which of the others are trained."""
        device = self.accelerator.device
        width = max(len(row.ids) for row in rows)

        def pad(values: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
            filled = [[*line, *[0] * (width - len(line))] for line in values]
            return torch.tensor(filled, dtype=dtype, device=device)

        ids = pad([row.ids for row in rows], torch.long)
        real = pad([[1] * len(row.ids) for row in rows], torch.long)
        inputs = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": real[:, :1],
            "completion_ids": ids[:, 1:],
            "completion_mask": real[:, 1:],
            "tool_mask": pad([row.mask for row in rows], torch.long)[:, 1:],
            "old_per_token_logps": pad([row.log_probs for row in rows], torch.float32)[:, 1:],
            "advantages": torch.tensor([row.advantage for row in rows], dtype=torch.float32, device=device),
            "num_items_in_batch": torch.tensor(float(trained), device=device),
        }
        if not self.packs:
            return MicroBatch(inputs, None, ids.numel())
        plan = plan_tree([row.ids for row in rows], [row.mask for row in rows], device)
        return MicroBatch(inputs, plan, plan.forwarded)

    def _set_checkpointing(self, wanted: bool) -> None:
        model = self.accelerator.unwrap_model(self.model).get_base_model()
        if wanted and not model.is_activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        elif model.is_activation_checkpointing and not wanted:
            model.activation_checkpointing_disable()


def make_optimizer(
    policy: PeftModel, learning_rate: float
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW on the adapter alone, betas (0.9, 0.99), no decay, constant rate, no warm-up."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, foreach=True
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, _constant)


def _constant(_: int) -> float:
    return 1.0


def _no_reward(**_: Any) -> None:
    raise AssertionError("rewards come with the batch")


def _placeholder_tokenizer() -> PreTrainedTokenizerFast:
    """TRL wants a tokenizer; the trainer sees token ids only."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"-": 0}, unk_token="-")), pad_token="-", eos_token="-", unk_token="-"
    )


def _arguments(hyper: Hyperparameters, output_dir: str) -> GRPOConfig:
    if hyper.loss_type not in LOSSES:
        raise UnknownLoss(f"loss_type {hyper.loss_type!r} is none of {sorted(LOSSES)}")
    return GRPOConfig(
        output_dir=output_dir,
        max_steps=hyper.steps,
        learning_rate=hyper.learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.99,
        max_grad_norm=hyper.max_grad_norm,
        loss_type=hyper.loss_type,
        # cispo's bound is absolute (1 + ε), the others' is relative to 1.
        epsilon=hyper.epsilon,
        epsilon_high=1 + hyper.epsilon if hyper.loss_type == "cispo" else hyper.epsilon,
        beta=0.0,
        use_bias_correction_kl=False,
        temperature=hyper.temperature,
        scale_rewards="none",
        per_device_train_batch_size=2,
        num_generations=2,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        shuffle_dataset=False,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
        cast_lm_head_to_fp32=False,
        use_vllm=False,
        seed=hyper.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
