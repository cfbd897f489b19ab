"""The job's plan: every `auto` and every default resolved to a number, once, when the files are valid (design §5).

Does not cover: when it is stored (`validation_service`) and who executes it (`workers`). Pure: no clock, no disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from app.models.catalogue import BaseModel

GROUP_BASE = 8  # rollouts per row at compute_multiplier 1
MAX_GROUP = 80
DEFAULT_MAX_EPISODE_STEPS = 10
DEFAULT_TOKENS_PER_TURN = 512
DEFAULT_TOKENS_PER_EPISODE = 4096
DEFAULT_ENDPOINT_TIMEOUT_S = 120.0
DEFAULT_ROLLOUT_TIMEOUT_S = 900.0
DEFAULT_MAX_STALENESS = 1
DEFAULT_IMPORTANCE_RANGE = (0.5, 2.0)
DEFAULT_MAX_SEQUENCE_TV = 0.25


@dataclass(frozen=True)
class Plan:
    """What will be done. Stored on the job as JSON and never changed.

    `group_size`: rollouts per training row. `max_trained_rollouts`: per step, those with the largest |advantage| are
    trained; None = all. `max_episode_steps` counts assistant messages. Timeouts are seconds. `max_staleness`: policy
    versions between the one that sampled a group and the one that is trained on it. `importance_range`: tokens whose
    probability under trainer and sampler has another ratio are masked; `max_sequence_tv`: so are whole sequences whose
    mean |ratio - 1| / 2 is above; None switches either off.
    """

    train_rows: int
    valid_rows: int
    batch_size: int
    n_epochs: int
    group_size: int
    total_steps: int
    learning_rate: float
    learning_rate_multiplier: float
    compute_multiplier: float
    eval_interval: int
    eval_samples: int
    max_episode_steps: int
    max_tokens_per_turn: int
    max_tokens_per_episode: int
    tool_timeout_s: float
    grader_timeout_s: float
    rollout_timeout_s: float
    max_staleness: int
    importance_range: tuple[float, float] | None
    max_sequence_tv: float | None
    kl_beta: float
    on_no_signal: str
    max_trained_rollouts: int | None
    loss_type: str
    lora_rank: int
    lora_alpha: int
    lora_targets: tuple[str, ...]
    temperature: float
    seed: int

    def as_dict(self) -> dict[str, Any]:
        bounds = None if self.importance_range is None else list(self.importance_range)
        return {**asdict(self), "lora_targets": list(self.lora_targets), "importance_range": bounds}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """From the stored JSON; keys that a newer version wrote are ignored."""
        known = {field.name: data[field.name] for field in fields(cls)}
        bounds = None if known["importance_range"] is None else tuple(known["importance_range"])
        return cls(**{**known, "lora_targets": tuple(known["lora_targets"]), "importance_range": bounds})

    def hyperparameters(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The wire's hyperparameters with numbers in place of `auto`."""
        resolved = {
            "n_epochs": self.n_epochs,
            "batch_size": self.batch_size,
            "learning_rate_multiplier": self.learning_rate_multiplier,
            "compute_multiplier": self.compute_multiplier,
            "eval_interval": self.eval_interval,
            "eval_samples": self.eval_samples,
        }
        return {**asked, **resolved}


def resolve(
    method: Mapping[str, Any],
    options: Mapping[str, Any],
    train_rows: int,
    valid_rows: int,
    model: BaseModel,
    seed: int,
) -> Plan:
    """`method` is the canonical one, `options` the `hone` object as given; formulas of design §5.

    Steps = ceil(rows × epochs / batch). A batch larger than the file wraps into the next epoch.
    """
    reinforcement = method["reinforcement"]
    asked = reinforcement["hyperparameters"]
    batch = int(_given(asked, "batch_size", min(max(train_rows // 8, 4), 32)))
    epochs = int(_given(asked, "n_epochs", min(max(math.ceil(50 / math.ceil(train_rows / batch)), 1), 10)))
    total = math.ceil(train_rows * epochs / batch)
    compute = float(_given(asked, "compute_multiplier", 1.0))
    multiplier = float(_given(asked, "learning_rate_multiplier", 1.0))
    rank = int(options.get("lora_rank", model.lora_rank))
    episode = int(options.get("max_tokens_per_episode", min(DEFAULT_TOKENS_PER_EPISODE, model.context)))
    bounds = options.get("importance_range", DEFAULT_IMPORTANCE_RANGE)
    sequence_tv = options.get("max_sequence_tv", DEFAULT_MAX_SEQUENCE_TV)
    return Plan(
        train_rows=train_rows,
        valid_rows=valid_rows,
        batch_size=batch,
        n_epochs=epochs,
        group_size=min(max(math.floor(GROUP_BASE * compute + 0.5), 2), MAX_GROUP),
        total_steps=total,
        learning_rate=float(options.get("learning_rate", model.base_learning_rate * multiplier)),
        learning_rate_multiplier=multiplier,
        compute_multiplier=compute,
        eval_interval=int(_given(asked, "eval_interval", max(1, total // 10))),
        eval_samples=int(_given(asked, "eval_samples", 1)),
        max_episode_steps=int(reinforcement.get("max_episode_steps", DEFAULT_MAX_EPISODE_STEPS)),
        max_tokens_per_turn=int(options.get("max_tokens_per_turn", min(DEFAULT_TOKENS_PER_TURN, episode))),
        max_tokens_per_episode=episode,
        tool_timeout_s=float(options.get("tool_timeout_s", DEFAULT_ENDPOINT_TIMEOUT_S)),
        grader_timeout_s=float(options.get("grader_timeout_s", DEFAULT_ENDPOINT_TIMEOUT_S)),
        rollout_timeout_s=float(options.get("rollout_timeout_s", DEFAULT_ROLLOUT_TIMEOUT_S)),
        max_staleness=int(options.get("max_staleness", DEFAULT_MAX_STALENESS)),
        importance_range=None if bounds == "off" else (float(bounds[0]), float(bounds[1])),
        max_sequence_tv=None if sequence_tv == "off" else float(sequence_tv),
        kl_beta=float(options.get("kl_beta", 0.0)),
        on_no_signal=str(options.get("on_no_signal", "stop")),
        max_trained_rollouts=options.get("max_trained_rollouts"),
        loss_type=str(options.get("loss_type", "dapo")),
        lora_rank=rank,
        lora_alpha=2 * rank,
        lora_targets=model.lora_targets,
        temperature=1.0,
        seed=seed,
    )


def _given(asked: Mapping[str, Any], name: str, auto: float) -> float:
    value = asked.get(name, "auto")
    return auto if value == "auto" else float(value)
