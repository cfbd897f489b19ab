"""The update: TRL's stable GRPOTrainer fed with whole optimizer-step batches from our rollout engine.

Does not cover: where batches come from and what follows a step (`workers.trainer.session`), advantages (they arrive
with the rows), rewards and generation (TRL's own are never used).

Private names of TRL 1.16.0 this relies on: `_prepare_inputs`, `_compute_loss`, `_get_per_token_logps_and_entropies`,
`_send_telemetry`, `_metrics`, `beta`, and the keys of the batch dictionary. Tests in tests/unit/trainer hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from workers.trainer.diagnostics import Clip, Diagnostics, TokenFacts
from workers.trainer.importance import NO_LIMITS, Limits, kept_tokens, turn_depth
from workers.trainer.model import attend, packs
from workers.trainer.packing import TreePlan, plan_tree
from workers.trainer.scoring import Scores, score_padded, score_tree
from workers.trainer.world import World

# Losses whose token mean is exact over a whole optimizer step.
LOSSES = frozenset({"dapo", "cispo", "vespo"})


class EmptyBatch(Exception):
    """A batch without a trained token: Adam would move the weights on a zero gradient."""


class NothingKept(Exception):
    """Every trained token was masked: the sampler does not serve the policy that is trained."""


class UnknownLoss(Exception):
    """A loss whose micro-batch average is not the token mean of the step."""


@dataclass(frozen=True)
class Hyperparameters:
    """What the optimizer step is made of. `steps` still to take in this process; `beta` weighs the KL to the base."""

    steps: int
    learning_rate: float
    loss_type: str
    temperature: float
    epsilon: float
    max_grad_norm: float
    seed: int
    beta: float = 0.0
    limits: Limits = NO_LIMITS


@dataclass(frozen=True)
class MicroBatch:
    """TRL's dictionary for some rows, what is trained in it, and the rows' trie plan (None: padded).

    `where`: (row, completion position) of each trained token; `depth`: the turn of each, in the same order.
    """

    inputs: dict[str, Tensor]
    where: tuple[Tensor, Tensor]
    depth: Tensor
    plan: TreePlan | None
    forwarded: int
    counts: bool = True  # False: repeated rows without effect, because other ranks have one micro-batch more


class PackedGRPO(GRPOTrainer):  # type: ignore[misc]  # untyped base
    """One optimizer step = one call of `next_rows` = one batch, in as many micro-batches as memory asks for.

    In a `world` of several ranks every rank gets the whole batch, takes its share of the rows, and ends with the same
    gradient: that of the mean over all trained tokens.
    """

    def __init__(
        self,
        policy: PeftModel,
        hyper: Hyperparameters,
        output_dir: str,
        next_rows: Callable[[], Sequence[TrainingRow]],
        progress: Callable[[int, int], None],
        callback: TrainerCallback,
        optimizers: tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR],
        world: World | None = None,
        gpu_share: float | None = None,
        in_step: bool = False,
    ) -> None:
        """`in_step`: all ranks make the same number of passes, as a sharded base needs."""
        self._next_rows, self._progress, self._hyper = next_rows, progress, hyper
        self._world, self._in_step = world or World(), in_step
        self._micro: MicroBatch | None = None
        self._scored: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._done = self._total = 0
        self.diagnostics = Diagnostics(_clip(hyper))
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
        # Not through the arguments: TRL would then copy the adapter as its reference. Ours is the base, adapter off.
        self.beta = hyper.beta
        self._plain = packs(policy.get_base_model().config)
        self.arrange = budget.cheaper if self._plain else budget.padded
        self.budget = budget.token_budget(
            policy.config,
            policy.get_base_model().dtype,
            self.accelerator.device,
            budget.MemoryLimits(self._world.size, gpu_share),
        )

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        batch = self._next_rows()
        self.diagnostics = Diagnostics(_clip(self._hyper), raw_tokens=sum(len(row.ids) for row in batch))
        self._metrics["train"].clear()
        trained = sum(sum(row.mask[1:]) for row in batch)
        if not trained:
            raise EmptyBatch(f"none of the {len(batch)} rows has a trained token")
        batch = [row for row in batch if any(row.mask[1:])]
        rows = [batch[i] for i in budget.share([row.ids for row in batch], self._world.rank, self._world.size)]
        cut = self.arrange([row.ids for row in rows], self.budget)
        counts = [len(cut.rows)]
        if self._in_step:
            everybody = self._world.gather((len(cut.rows), cut.checkpoint))
            counts = [count for count, _ in everybody]
            cut = replace(cut, checkpoint=any(checkpoint for _, checkpoint in everybody))
        self._set_checkpointing(cut.checkpoint)
        if self._plain:
            attend(self.model, as_trie=cut.packed)
        loss = torch.zeros((), device=self.accelerator.device)
        self._done, self._total = 0, (3 if self.beta else 2) * max(counts)
        self._progress(0, self._total)
        micro_batches = [[rows[i] for i in indices] for indices in cut.rows]
        for index in range(max(counts)):
            counts_here = index < len(micro_batches)
            chosen = micro_batches[index] if counts_here else batch[:1]
            self._micro = replace(self._collate(chosen, trained, packed=cut.packed), counts=counts_here)
            loss += super().training_step(model, inputs, num_items_in_batch)
            self._advance()
        self._micro = self._scored = None
        return self._joined(loss)

    def _joined(self, loss: Tensor) -> Tensor:
        """Sum gradients, loss and diagnostics over the ranks. Every rank divided by the tokens of the whole batch."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:  # this rank had no row
                parameter.grad = torch.zeros_like(parameter)
        self._world.add_([parameter.grad for parameter in trained if parameter.grad is not None])
        self._world.add_([loss])
        everybody = self._world.gather(self.diagnostics)
        self.diagnostics.include([part for rank, part in enumerate(everybody) if rank != self._world.rank])
        if not self.diagnostics.kept:
            figures = self.diagnostics.metrics()
            raise NothingKept(
                f"all {self.diagnostics.tokens} trained tokens are masked: sampler and trainer disagree "
                f"(median ratio {figures['importance_p50']:.3g}, k3 KL {figures['mismatch_kl']:.3g})"
            )
        self.step_loss = loss.item()
        return loss

    def _send_telemetry(self) -> None:
        """Nothing about a job leaves the host, whatever the environment says."""

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Tensor]:
        assert self._micro is not None
        return self._micro.inputs

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Forward first, so that the mask can depend on the log-probs that the loss is computed from."""
        micro = self._micro
        assert micro is not None
        inputs, where, kl = dict(inputs), micro.where, None
        if self.beta:
            with torch.no_grad(), model.disable_adapter():
                inputs["ref_per_token_logps"] = self._score(model, micro)[0]
            self._advance()
        self._scored = new, entropy, _ = self._score(model, micro)
        self._advance()
        trained, old = inputs["tool_mask"], inputs["old_per_token_logps"]
        now = new.detach()
        kept, masked_rows = kept_tokens(now, old, trained * micro.counts, self._hyper.limits)
        if micro.counts:
            if self.beta:
                down = inputs["ref_per_token_logps"][where] - now[where]
                kl = torch.expm1(down) - down
            facts = TokenFacts(
                now[where],
                old[where],
                entropy[where],
                inputs["advantages"][where[0]],
                kept[where],
                micro.depth,
                kl,
            )
            self.diagnostics.add(facts, len(new), int(masked_rows.sum()))
            self.diagnostics.forwarded_tokens += micro.forwarded
            self.diagnostics.micro_batches += 1
        inputs["tool_mask"] = kept.long()
        # A masked ratio may be infinite, and infinity times a mask of zero is not a number.
        inputs["old_per_token_logps"] = torch.where(kept, old, now)
        loss: Tensor = super()._compute_loss(model, inputs)
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        assert self._scored is not None
        return self._scored

    def _score(self, model: Any, micro: MicroBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probs and entropies [rows, completion positions], adapter on or off as set; TRL's auxiliary loss."""
        prompt, completion = micro.inputs["prompt_ids"], micro.inputs["completion_ids"]
        ids = torch.cat([prompt, completion], dim=1)
        if not self._plain:
            real = torch.cat([micro.inputs["prompt_mask"], micro.inputs["completion_mask"]], dim=1)
            scores: tuple[Tensor, Tensor, Tensor | None] = super()._get_per_token_logps_and_entropies(
                model, ids, real, completion.shape[1], compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
            )
            return scores
        if micro.plan is None:
            rows, positions = micro.where
            flat = score_padded(model, ids, (rows, positions + 1), self._hyper.temperature)
        else:
            flat = score_tree(model, micro.plan, self._hyper.temperature)
        return (*_unflatten(flat, micro.where, completion.shape), None)

    def _advance(self) -> None:
        """A forward or a backward pass is done."""
        self._done += 1
        self._progress(self._done, self._total)

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        self.grad_norm = float(norm)
        return norm

    def _collate(self, rows: Sequence[TrainingRow], trained: int, *, packed: bool) -> MicroBatch:
        """TRL's keys, right-padded. The first token is the prompt; `tool_mask` says which of the others are trained."""
        device = self.accelerator.device
        width = max(len(row.ids) for row in rows)

        def pad(values: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
            filled = [[*line, *[0] * (width - len(line))] for line in values]
            return torch.tensor(filled, dtype=dtype, device=device)

        ids = pad([row.ids for row in rows], torch.long)
        real = pad([[1] * len(row.ids) for row in rows], torch.long)
        depth = pad([turn_depth(row.mask) for row in rows], torch.long)[:, 1:]
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
        if packed:
            plan = plan_tree([row.ids for row in rows], [row.mask for row in rows], device)
            where = (plan.trained_rows, plan.trained_positions - 1)
            return MicroBatch(inputs, where, depth[where], plan, plan.forwarded)
        rows_of, positions = inputs["tool_mask"].nonzero(as_tuple=True)
        return MicroBatch(inputs, (rows_of, positions), depth[rows_of, positions], None, ids.numel())

    def _set_checkpointing(self, wanted: bool) -> None:
        model = self.accelerator.unwrap_model(self.model).get_base_model()
        if wanted and not model.is_activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        elif model.is_activation_checkpointing and not wanted:
            model.activation_checkpointing_disable()


def _unflatten(scores: Scores, where: tuple[Tensor, Tensor], shape: torch.Size) -> tuple[Tensor, Tensor]:
    blank = torch.zeros(shape, device=scores.log_probs.device)
    return blank.index_put(where, scores.log_probs), blank.index_put(where, scores.entropy)


def _clip(hyper: Hyperparameters) -> Clip:
    """dapo clips both ways; cispo only caps the weight, whose gradient stays; vespo weighs whole rows."""
    if hyper.loss_type == "dapo":
        return Clip(1 - hyper.epsilon, 1 + hyper.epsilon)
    return Clip(None, 1 + hyper.epsilon if hyper.loss_type == "cispo" else None)


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
        beta=0.0,  # see PackedGRPO.__init__
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
